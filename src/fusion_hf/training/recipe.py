"""Read a recipe, the YAML file of a whole training run, with the overrides of the command line and the files it names.

This module imports nothing heavy, so that an invalid recipe is reported at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import check_place
from fusion_hf.common.yaml_config import check_keys, convert_value, parse_override, read_yaml_keys
from fusion_hf.data.image_places import ImagePlaces
from fusion_hf.data.mixture import read_entries
from fusion_hf.hub.folders import FINISHED_FILE, find_folder
from fusion_hf.training.recipe_keys import OwnArguments, all_keys, keys_of
from fusion_hf.training.reporters import check_reporters

if TYPE_CHECKING:
    from fusion_hf.training.arguments import FusionTrainingArguments

CHECKPOINT_CHOICES = ("auto", "none")
REQUIRED = ("model", "data", "output_dir")
PATHS = ("data", "data_root", "eval_data")  # paths in a recipe are relative to its folder
# Keys that change what a run computes. A run resumes only with the same values; all other keys may change.
DECISIVE = (
    *("model", "data", "data_root", "streaming", "on_broken", "global_batch_size", "train", "query_lens"),
    *("max_length", "group_by", "learning_rate", "vision_tower_learning_rate", "projector_learning_rate"),
    *("sampler_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs"),
    *("max_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed"),
    *("data_seed", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "load_in_4bit"),
    *("lora_parts", "lora_dora", "lora_rslora", "lora_bias", "load_in_8bit"),
    *("on_truncated", "max_image_pixels", "query_len_draw", "loss_average"),
)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """
    Read, check and convert the keys and values of a recipe.

    Args:
        path: a YAML file of keys and values. Relative paths in it are relative to its folder.
        overrides: texts of the form `key=value` with values in YAML. Their paths are relative to the working
            directory.

    Returns:
        The values by key.

    Raises:
        InputError: if the file is not a recipe, a key is unknown (the message names the nearest known one), or a value
            is invalid.
    """
    path = Path(path)
    values = read_yaml_keys(path, "The recipe")
    check_keys(values, all_keys(), f"The recipe {path}")
    for key in PATHS:
        if isinstance(values.get(key), str):
            values[key] = _relative_to(path.parent, values[key])
    if isinstance(values.get("image_roots"), list):
        values["image_roots"] = [
            _relative_to(path.parent, name) if isinstance(name, str) else name for name in values["image_roots"]
        ]
    overridden = dict(parse_override(text, "learning_rate=1e-5") for text in overrides)
    check_keys(overridden, all_keys(), "The command line")
    values |= overridden
    values = {key: convert(key, value) for key, value in values.items()}
    for key in REQUIRED:
        if values.get(key) is None:
            raise InputError(f"{path} must set `{key}`. Add it, or give {key}=... on the command line.")
    OwnArguments(**{key: values[key] for key in keys_of(OwnArguments) if key in values}).check()
    return values


def _relative_to(folder: Path, name: str) -> str:
    """Resolve a path of the recipe. A Hub id, which is no path in the folder, is returned unchanged."""
    is_path = name.startswith(".") or (folder / name).exists()
    return str(folder / name) if is_path and not Path(name).is_absolute() else name


def check_files(values: Mapping[str, Any]) -> None:
    """
    Check that the files of a run exist and its folder is writable. A finished run reads no files.

    Args:
        values: the keys and values of the recipe.

    Raises:
        InputError: if something is missing. The message names the key.
    """
    output = Path(values["output_dir"])
    if (output / FINISHED_FILE).is_file():
        return
    check_reporters(values.get("report_to"))
    for key, root in (("data", values.get("data_root")), ("eval_data", None)):
        if values.get(key) is not None:
            for entry in read_entries(values[key], root, key):
                entry.locate()  # data sets of the Hub are not checked
    ImagePlaces.named(*(values.get(key) for key in ("image_roots", "image_hosts", "private_image_hosts")))
    given = values.get("resume_from_checkpoint")
    if given not in (None, *CHECKPOINT_CHOICES) and not Path(str(given)).is_dir():
        raise InputError(f"`resume_from_checkpoint` must be auto, none, or the folder of a checkpoint, got {given!r}.")
    check_place(output, "output_dir")
    find_folder(values["model"])  # comes last, since it may download from the Hub


def convert(key: str, value: Any) -> Any:
    """
    Convert a YAML value to the type of its key. YAML reads `1e-5` as text, and `1` as an integer where a float is
    meant.

    Args:
        key: the name of the key.
        value: the value as YAML reads it.

    Returns:
        The converted value.

    Raises:
        InputError: if the value cannot be converted. The message names the key, the value and the type.
    """
    known = all_keys()[key]
    if value is None and known.takes_none:
        return None
    if value is False and key.endswith("_strategy"):
        return "no"  # YAML reads `no` as false
    if isinstance(value, bool) and not {int, float} & known.kinds and known.kinds != {list}:
        return value  # transformers decides whether a key for texts also accepts a boolean
    return convert_value(known.kinds, value, key)


def default_of(key: str) -> Any:
    """
    Return the default of a key, or None if it depends on other keys.

    Args:
        key: the name of the key.
    """
    from fusion_hf.training.arguments import FusionTrainingArguments

    (field,) = [field for field in fields(FusionTrainingArguments) if field.name == key]
    return None if field.default is MISSING else field.default


def changed_keys(began: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    Find the decisive keys whose values differ from those that a run was started with.

    Args:
        began: the values that the run was started with. Missing keys have their default.
        values: the values now.

    Returns:
        The value before and the value now, by key.
    """
    pairs = {key: (began.get(key, default_of(key)), values.get(key, default_of(key))) for key in DECISIVE}
    return {key: (before, now) for key, (before, now) in pairs.items() if before != now}


def split_batch(values: Mapping[str, Any], world_size: int) -> tuple[int, int]:
    """
    Divide the global batch into records per process and pass, and passes per step.

    If one of `per_device_train_batch_size` and `gradient_accumulation_steps` is given, the other follows from it.
    Without either, a process takes its share in one pass.

    Args:
        values: the keys and values of the recipe.
        world_size: the number of processes.

    Returns:
        The number of records per pass, and the number of passes per step.

    Raises:
        InputError: if the numbers do not divide each other. The message names all of them.
    """
    total = values.get("global_batch_size")
    batch, passes = values.get("per_device_train_batch_size"), values.get("gradient_accumulation_steps")
    if total is None:
        from transformers import TrainingArguments

        batch = TrainingArguments.per_device_train_batch_size if batch is None else batch
        return batch, 1 if passes is None else passes
    for key in ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if values.get(key) is not None and values[key] < 1:
            raise InputError(f"`{key}` must be 1 or more, got {values[key]}.")
    share, remainder = divmod(total, world_size)
    if remainder:
        raise InputError(f"`global_batch_size` must be a multiple of the {world_size} processes, got {total}.")
    if batch is None:
        batch = share if passes is None else share // passes
    if passes is None:
        passes = share // batch
    if batch * passes != share:
        raise InputError(
            f"`per_device_train_batch_size` times `gradient_accumulation_steps` must be {share}, since "
            f"`global_batch_size` is {total} in {world_size} processes, got {batch} times {passes}."
        )
    return batch, passes


def make_arguments(values: Mapping[str, Any], world_size: int) -> "FusionTrainingArguments":
    """
    Make the training arguments of a run.

    Args:
        values: the keys and values of the recipe.
        world_size: the number of processes.

    Raises:
        InputError: if transformers rejects a value.
    """
    from fusion_hf.training.arguments import FusionTrainingArguments
    from fusion_hf.training.gradient_checkpointing import RENAMED_KEYS

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
        raise InputError(f"transformers rejects the recipe: {error}") from error
