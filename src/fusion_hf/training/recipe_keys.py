"""
The keys of a recipe: those of FUSION, and those of transformers' `TrainingArguments`.

An invalid key is reported before torch is imported, which takes seconds. So this module imports neither torch nor
transformers, and reads the keys of transformers from the source of the installed version.
"""

import ast
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError
from fusion_hf.common.user_values import DTYPE_NAMES, is_square
from fusion_hf.data.record_parsing import ON_BROKEN, ON_TRUNCATED

VISION_TOWER, PROJECTORS, SAMPLERS, LANGUAGE_MODEL = "vision_tower", "projectors", "samplers", "language_model"
PARTS = (VISION_TOWER, PROJECTORS, SAMPLERS, LANGUAGE_MODEL)
TOKENS, MICRO_BATCHES = LOSS_AVERAGES = ("tokens", "micro_batches")
STEP, MICRO_BATCH = QUERY_LEN_DRAWS = ("step", "micro_batch")
MODALITY_LENGTH, LENGTH, _ = GROUP_BY = ("modality_length", "length", "none")
NO_BIAS = "none"
LORA_BIASES = (NO_BIAS, "lora_only", "all")
LEAST = {"max_skipped": 0, "eval_samples": 0, "eval_max_new_tokens": 1, "lora_rank": 0, "max_image_pixels": 1}
FULL = 4  # bytes of float32
# bytes that an optimizer keeps per trained weight
OPTIMIZER_BYTES = {
    "adamw_torch_fused": 2 * FULL,
    "adamw_torch": 2 * FULL,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "sgd": 0,
}
DEFAULT_OPTIMIZER = "adamw_torch_fused"
# the file in which transformers declares its keys
SOURCE, CLASS = "training_args.py", "TrainingArguments"
BUILT_IN: Mapping[str, type] = {kind.__name__: kind for kind in (int, float, bool, str, list, dict)}


def _key(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """
    Make a field with its description in the recipe reference and, if the values are a fixed set of texts, its
    choices.
    """
    return field(default=default, metadata={"help": text} if choices is None else {"help": text, "choices": choices})


@dataclass
class OwnArguments:
    """The keys of a recipe that FUSION adds to `TrainingArguments`."""

    model: str | None = _key(None, "Folder or Hub repository of the FUSION model to start from.")
    data: str | None = _key(
        None,
        "Training records: a mixture (YAML), a JSON, JSONL, CSV or Parquet file, a folder of images, tar shards, or a "
        "Hub id.",
    )
    data_root: str | None = _key(
        None, "Folder that relative paths in `data` refer to. Defaults to the folder of `data`."
    )
    data_cache: str | None = _key(
        None, "Folder for the index of `data`. Defaults to a folder in the Hugging Face cache."
    )
    streaming: bool = _key(False, "Whether to read `data` in its own order, without an index. Requires `max_steps`.")
    on_broken: str = _key(
        "error",
        "What a broken record does: `error` ends the run, `skip` leaves the record out and counts it.",
        ON_BROKEN,
    )
    max_skipped: int = _key(100, "Maximum number of skipped records. One more ends the run.")
    on_truncated: str = _key(
        "error",
        "What to do with truncated image files: `error` treats them as broken, `load` trains on them.",
        ON_TRUNCATED,
    )
    max_image_pixels: int | None = _key(
        None,
        "Maximum number of pixels of an image. Larger images are broken. Defaults to the image processor's limit.",
    )
    image_roots: list[str] | None = field(
        default=None, metadata={"help": "Further folders that absolute image paths and symbolic links may point to."}
    )
    image_hosts: list[str] | None = field(
        default=None, metadata={"help": "Hosts that images may be downloaded from by http or https."}
    )
    private_image_hosts: list[str] | None = field(
        default=None, metadata={"help": "Like `image_hosts`, for hosts of a private network or of this machine."}
    )
    eval_data: str | None = _key(None, "Held-out records for evaluation, in the same forms as `data`.")
    eval_samples: int = _key(
        0, "Number of `eval_data` records to answer at each evaluation, for the share of exact matches."
    )
    eval_max_new_tokens: int = _key(32, "Maximum length of these answers in tokens.")
    global_batch_size: int | None = _key(
        None, "Number of records per optimizer step, over all processes and accumulation steps."
    )
    train: list[str] = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "Parts to train. The others are frozen. Defaults to all parts, or with LoRA to projectors, "
            "samplers and `lora_parts`."
        },
    )
    vision_tower_learning_rate: float | None = _key(
        None, "Learning rate of the vision tower. Defaults to `learning_rate`."
    )
    projector_learning_rate: float | None = _key(
        None, "Learning rate of both projectors. Defaults to `learning_rate`."
    )
    sampler_learning_rate: float | None = _key(None, "Learning rate of the samplers. Defaults to `learning_rate`.")
    query_lens: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of latent tokens (perfect squares), from which one is drawn per step. Defaults to the "
            "model's list."
        },
    )
    query_len_draw: str = _key(
        "step", "How often to draw from `query_lens`: once per `step`, or once per `micro_batch`.", QUERY_LEN_DRAWS
    )
    loss_average: str = _key(
        "tokens",
        "How to average the loss of a step: over all its `tokens`, or as the mean of the losses of its "
        "`micro_batches`.",
        LOSS_AVERAGES,
    )
    max_length: int | None = _key(
        None,
        "Maximum number of tokens. Longer conversations are truncated on the right. Defaults to the tokenizer's "
        "maximum.",
    )
    group_by: str = _key(
        MODALITY_LENGTH,
        "How to group records into steps: `modality_length` (with or without image, and by length, as the authors "
        "do), `length` (by number of tokens), or `none`.",
        GROUP_BY,
    )
    lora_rank: int = _key(0, "Rank of LoRA in the linear layers of `lora_parts`. 0 disables LoRA.")
    lora_parts: list[str] | None = field(
        default=None,
        metadata={"help": "Parts that get LoRA instead of full training. Defaults to the language model."},
    )
    lora_alpha: float | None = _key(None, "Scale of LoRA. Defaults to twice the rank.")
    lora_dropout: float = _key(0.05, "Dropout probability at the input of LoRA layers.")
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the linear layers that get LoRA. Defaults to all linear layers of `lora_parts`."},
    )
    lora_dora: bool = _key(
        False, "Whether to use DoRA, which trains the magnitude of weights separately from their direction."
    )
    lora_rslora: bool = _key(
        False, "Whether to use rsLoRA, which divides `lora_alpha` by the square root of the rank instead of the rank."
    )
    lora_bias: str = _key(
        NO_BIAS,
        "Biases to train: `none`, those of layers with LoRA (`lora_only`), or those of all parts in `train` (`all`).",
        LORA_BIASES,
    )
    load_in_4bit: bool = _key(
        False, "Whether to keep the frozen language model in 4 bits (NF4, QLoRA). Requires the extra `quant`."
    )
    load_in_8bit: bool = _key(
        False, "Whether to keep the frozen language model in 8 bits. Requires the extra `quant`."
    )
    save_dtype: str = _key(
        "float32", "Dtype of the finished model's weights. Checkpoints always keep the trained precision.", DTYPE_NAMES
    )
    peak_tflops: float | None = _key(
        None, "Peak of one device in TFLOP/s, for the utilization. Defaults to the measured rate of a matrix product."
    )

    def check(self) -> None:
        """
        Check the values of all keys.

        Raises:
            InputError: if a value is invalid. The message names the key, the value and the allowed values.
        """
        for each in fields(OwnArguments):
            if "choices" in each.metadata:
                _allow(each.name, getattr(self, each.name), each.metadata["choices"])
        for name in ("train", "lora_parts"):
            given = getattr(self, name)
            for part in PARTS if given is None else given:
                _allow(name, part, PARTS)
            if given == []:
                raise InputError(f"`{name}` must contain at least one of {', '.join(PARTS)}, got [].")
        for length in self.query_lens if self.query_lens is not None else [1]:
            if not is_square(length):
                raise InputError(f"`query_lens` must contain perfect squares (1, 4, 9, 16, ...), got {length}.")
        if self.query_lens == []:
            raise InputError("`query_lens` must contain at least one perfect square, got [].")
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"`{name}` must be {least} or more, got {value}.")
        self._check_lora()

    def _check_lora(self) -> None:
        if self.load_in_4bit and not self.lora_rank:
            raise InputError(
                "`lora_rank` must be 1 or more if `load_in_4bit` is set, since 4-bit weights stay frozen, got 0."
            )
        if self.load_in_8bit and not self.lora_rank:
            raise InputError(
                "`lora_rank` must be 1 or more if `load_in_8bit` is set, since 8-bit weights stay frozen, got 0."
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("Only one of `load_in_4bit` and `load_in_8bit` may be true, got both.")
        if self.load_in_8bit and self.lora_dora:  # seen with PEFT 0.21 and bitsandbytes 0.50 on a CPU
            raise InputError(
                "`lora_dora` must be false if `load_in_8bit` is set, since DoRA loses the scales of 8-bit weights. "
                "Use `load_in_4bit` with DoRA."
            )
        for name in ("lora_parts", "lora_dora", "lora_rslora", "lora_bias"):
            value = getattr(self, name)
            if value not in (None, False, NO_BIAS) and not self.lora_rank:
                raise InputError(
                    f"`{name}` requires a `lora_rank` of 1 or more, got {name} = {value!r} and lora_rank = 0."
                )
        for part in self.adapted_parts:
            if self.train is not None and part not in self.train:
                raise InputError(
                    f"`train` must contain {part}, since `lora_parts` does, got {self.train}. Add it, remove it from "
                    "`lora_parts`, or set `lora_rank` to 0."
                )
        if self.lora_rank and LANGUAGE_MODEL in (self.train or ()) and LANGUAGE_MODEL not in self.adapted_parts:
            raise InputError(
                f"`lora_parts` must contain {LANGUAGE_MODEL}, since `train` does, got {self.lora_parts}. Add it, or "
                "remove it from `train`."
            )

    @property
    def adapted_parts(self) -> tuple[str, ...]:
        """Parts that get LoRA. Empty if `lora_rank` is 0."""
        if not self.lora_rank:
            return ()
        return (LANGUAGE_MODEL,) if self.lora_parts is None else tuple(self.lora_parts)

    @property
    def default_train(self) -> list[str]:
        """Parts that are trained if `train` is not given."""
        if not self.lora_rank:
            return list(PARTS)
        return [part for part in PARTS if part in (PROJECTORS, SAMPLERS, *self.adapted_parts)]


def _allow(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


@dataclass(frozen=True)
class KeyTypes:
    """The plain types that the value of a key may have. `kinds` leaves None out."""

    kinds: frozenset[type]
    takes_none: bool


@cache
def all_keys() -> Mapping[str, KeyTypes]:
    """List the types of all keys that a recipe can have, by name."""
    return {**transformers_keys(), **keys_of(OwnArguments)}


def transformers_keys() -> dict[str, KeyTypes]:
    """List the types of the keys of transformers' `TrainingArguments`, by name."""
    folders = (spec.submodule_search_locations if (spec := find_spec("transformers")) is not None else None) or ()
    for folder in folders:
        path = Path(folder) / SOURCE
        tree = ast.parse(path.read_bytes()) if path.is_file() else ast.Module([], [])
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == CLASS and not node.bases:
                return dict(_declared(node))
    from transformers import TrainingArguments  # a version that declares it in another file

    return keys_of(TrainingArguments)


def keys_of(arguments: Any) -> dict[str, KeyTypes]:
    """
    List the types of the fields of a dataclass, by name.

    Args:
        arguments: the dataclass.
    """
    hints = typing.get_type_hints(arguments)
    return {each.name: _key_of(hints[each.name], each.default is None) for each in fields(arguments) if each.init}


def _declared(node: ast.ClassDef) -> Iterator[tuple[str, KeyTypes]]:
    """Yield the names and types of a dataclass's fields from its source."""
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        default: ast.expr | None = line.value
        if isinstance(default, ast.Call):  # a call of `field`
            settings = {keyword.arg: keyword.value for keyword in default.keywords}
            if isinstance(init := settings.get("init"), ast.Constant) and init.value is False:
                continue
            default = settings.get("default")
        kinds = frozenset(_written_kinds(line.annotation))
        if str in kinds:  # the other type is an enumeration, whose values are texts
            kinds &= {*BUILT_IN.values(), type(None)}
        is_none = isinstance(default, ast.Constant) and default.value is None
        yield line.target.id, KeyTypes(kinds - {type(None)}, type(None) in kinds or is_none)


def _written_kinds(hint: ast.expr) -> Iterator[type]:
    """
    Yield the plain types of an annotation in source form. An unknown name is a class that no YAML value can
    have.
    """
    if isinstance(hint, ast.BinOp):
        yield from (*_written_kinds(hint.left), *_written_kinds(hint.right))
    elif isinstance(hint, ast.Constant) and hint.value is None:
        yield type(None)
    elif isinstance(hint, ast.Subscript):
        name = hint.value.id if isinstance(hint.value, ast.Name) else ""
        inner = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        if name in ("Union", "Optional"):
            yield from (kind for each in inner for kind in _written_kinds(each))
            if name == "Optional":
                yield type(None)
        else:
            yield BUILT_IN.get(name, str)  # `Literal` counts as a text
    elif isinstance(hint, ast.Name):
        yield BUILT_IN.get(hint.id) or type(hint.id, (), {})
    else:
        yield str


def _key_of(hint: Any, default_is_none: bool) -> KeyTypes:
    kinds = frozenset(_kinds(hint))
    return KeyTypes(kinds - {type(None)}, type(None) in kinds or default_is_none)


def _kinds(hint: Any) -> Iterable[type]:
    """Return the plain types of a type hint: float and NoneType for `float | None`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(hint) for kind in _kinds(part)}
    if isinstance(origin, type):
        return {origin}
    if isinstance(hint, type):
        return {str} if issubclass(hint, Enum) else {hint}
    return {str}


def check_optimizer(values: Mapping[str, Any]) -> str:
    """
    Return the optimizer of a recipe.

    Args:
        values: the keys and values of the recipe.

    Raises:
        InputError: if the memory use of the optimizer is unknown.
    """
    optimizer = values.get("optim") or DEFAULT_OPTIMIZER
    if optimizer not in OPTIMIZER_BYTES:
        raise InputError(f"`optim` must be one of {', '.join(OPTIMIZER_BYTES)} for a plan, got {optimizer!r}.")
    return optimizer
