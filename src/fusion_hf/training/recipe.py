"""A recipe: one YAML file that is a whole training run, and what the command line changes in it."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.training.keys import OwnArguments, all_keys, own_keys

if TYPE_CHECKING:
    from fusion_hf.training.arguments import FusionTrainingArguments

REQUIRED = ("model", "data", "output_dir")
PATHS = ("data", "data_root", "eval_data")  # a recipe's own are relative to its folder
# What a run computes. A checkpoint goes on only under the same of these; the others may change between two starts.
DECISIVE = (
    *("model", "data", "data_root", "streaming", "on_broken", "global_batch_size", "train", "query_lens"),
    *("max_length", "group_by", "learning_rate", "vision_tower_learning_rate", "projector_learning_rate"),
    *("sampler_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs"),
    *("max_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed"),
    *("data_seed", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "load_in_4bit"),
    *("on_truncated", "max_image_pixels", "query_len_draw", "loss_average"),
)
MAX_RECIPE_BYTES = 2**20


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """
    The keys and values of a recipe, checked and converted.

    Args:
        path: a YAML file of keys and values. Its relative `data` paths are relative to its folder.
        overrides: `key=value`, values as in YAML; their paths are relative to the working directory.

    Raises:
        InputError: for a file that is no recipe, an unknown key (names the nearest known one), or a wrong value.
    """
    path = Path(path)
    values = _read(path)
    for key in values:
        check_key(key)
    for key in PATHS:
        if isinstance(values.get(key), str):
            values[key] = _relative_to(path.parent, values[key])
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"{text!r} is no override; allowed: key=value, such as learning_rate=1e-5.")
        check_key(key)
        try:
            values[key] = yaml.safe_load(value) if value else None
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError(f"{key} is {short_name(repr(value))}, which is no YAML value.") from error
    values = {key: convert(key, value) for key, value in values.items()}
    for key in REQUIRED:
        if values.get(key) is None:
            raise InputError(f"{path} gives no {key}; add it, or say {key}=... on the command line.")
    OwnArguments(**{key: values[key] for key in own_keys() if key in values}).check()
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise InputError(f"{path} has more than {MAX_RECIPE_BYTES} bytes; a recipe is a short YAML file.")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"The recipe {path} is no YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"The recipe {path} holds a {type(values).__name__}; allowed: keys with values.")
    return values


def _relative_to(folder: Path, name: str) -> str:
    """Where a path of the recipe leads; a Hub id, which is no path there, stays as it is."""
    is_path = name.startswith(".") or (folder / name).exists()
    return str(folder / name) if is_path and not Path(name).is_absolute() else name


def check_key(key: str) -> None:
    """
    Raises:
        InputError: if no recipe has such a key; names the nearest one that it has.
    """
    if key in all_keys():
        return
    nearest = difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.0)[0]
    raise InputError(f"{short_name(repr(key))} is no key of a recipe; did you mean {nearest!r}?")


def convert(key: str, value: Any) -> Any:
    """
    A YAML value as the type that the key has: YAML reads `1e-5` as text, and `1` where 1.0 is meant.

    Raises:
        InputError: if it cannot be one; names the key, the value and the type.
    """
    known = all_keys()[key]
    kinds = known.kinds
    if value is None:
        if known.takes_none:
            return None
        raise InputError(f"{key} has no value; allowed: {_names(kinds)}.")
    if value is False and key.endswith("_strategy"):
        return "no"  # as which YAML reads it
    if isinstance(value, bool):
        if bool in kinds or not {int, float} & kinds:
            return value
    elif isinstance(value, int) and float in kinds and int not in kinds:
        return float(value)
    elif isinstance(value, str) and float in kinds and str not in kinds:
        try:
            return float(value)
        except ValueError:
            pass
    elif (isinstance(value, str) and str in kinds) or (kinds & {int, float, list, dict} and type(value) in kinds):
        return value
    elif isinstance(value, str | int | float) and list in kinds and str not in kinds:
        return [value]
    raise InputError(f"{key} is {value!r}; allowed: {_names(kinds)}.")


def default_of(key: str) -> Any:
    """The value of a key that a recipe does not give; None where it follows from others."""
    from fusion_hf.training.arguments import FusionTrainingArguments

    (field,) = [field for field in fields(FusionTrainingArguments) if field.name == key]
    return None if field.default is MISSING else field.default


def changed_keys(began: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    What a run would compute otherwise than it began to: the values of a decisive key, before and now. A key that a
    recipe does not give has its default.
    """
    pairs = {key: (began.get(key, default_of(key)), values.get(key, default_of(key))) for key in DECISIVE}
    return {key: (before, now) for key, (before, now) in pairs.items() if before != now}


def _names(kinds: Iterable[type]) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    return " or ".join(sorted(names.get(kind, kind.__name__) for kind in kinds))


def split_batch(values: Mapping[str, Any], world_size: int) -> tuple[int, int]:
    """
    Records per process and pass, and passes per step: together with the processes they make the global batch.

    `per_device_train_batch_size` and `gradient_accumulation_steps` follow from one another; without either, a process
    takes its share in one pass.

    Raises:
        InputError: if they do not divide; names all numbers.
    """
    total = values.get("global_batch_size")
    batch, passes = values.get("per_device_train_batch_size"), values.get("gradient_accumulation_steps")
    if total is None:
        from transformers import TrainingArguments

        return (
            TrainingArguments.per_device_train_batch_size if batch is None else batch,
            1 if passes is None else passes,
        )
    for key in ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if values.get(key) is not None and values[key] < 1:
            raise InputError(f"{key} is {values[key]}; allowed: 1 or more.")
    share, remainder = divmod(total, world_size)
    if remainder:
        raise InputError(f"global_batch_size is {total}, which {world_size} processes do not divide.")
    if batch is None:
        batch = share if passes is None else share // passes
    if passes is None:
        passes = share // batch
    if batch * passes != share:
        raise InputError(
            f"global_batch_size is {total}: {share} for each of {world_size} processes, which is not "
            f"per_device_train_batch_size = {batch} times gradient_accumulation_steps = {passes}; allowed: divisors."
        )
    return batch, passes


def make_arguments(values: Mapping[str, Any], world_size: int) -> "FusionTrainingArguments":
    """The arguments of a run of `world_size` processes."""
    from fusion_hf.training.arguments import FusionTrainingArguments
    from fusion_hf.training.checkpointing import RENAMED_KEYS

    batch, passes = split_batch(values, world_size)
    settings = {**values, "per_device_train_batch_size": batch, "gradient_accumulation_steps": passes}
    if settings.get("gradient_checkpointing"):
        settings.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    for old, new in RENAMED_KEYS.items():
        if new in all_keys() and old in settings:
            settings[new] = settings.pop(old)
    try:
        return FusionTrainingArguments(**settings)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"transformers refuses the recipe: {error}") from error
