"""
The keys of a recipe: ours, and those of transformers' `TrainingArguments`.

A wrong key is told before torch is imported, which takes seconds. So this imports neither torch nor transformers, and
reads what transformers declares in the source of the installed version.
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
FULL = 4  # bytes of a float32
# bytes per trained weight that an optimizer keeps
OPTIMIZER_BYTES = {
    "adamw_torch_fused": 2 * FULL,
    "adamw_torch": 2 * FULL,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "sgd": 0,
}
DEFAULT_OPTIMIZER = "adamw_torch_fused"
# where transformers declares its own keys
SOURCE, CLASS = "training_args.py", "TrainingArguments"
BUILT_IN: Mapping[str, type] = {kind.__name__: kind for kind in (int, float, bool, str, list, dict)}


def _key(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """Make a field with its description in the reference of recipe keys, and its choices if it has some."""
    return field(default=default, metadata={"help": text} if choices is None else {"help": text, "choices": choices})


@dataclass
class OwnArguments:
    """The keys of a recipe that FUSION adds to those of transformers."""

    model: str | None = _key(None, "Folder or Hub repository of the model to start from.")
    data: str | None = _key(
        None,
        "Training records: a mixture (YAML), JSON, JSONL, CSV or Parquet, a folder of "
        "images or tar shards, or a Hub id.",
    )
    data_root: str | None = _key(
        None, "Folder of the files and images that `data` names. Default: the folder of `data`."
    )
    data_cache: str | None = _key(None, "Folder of the index of `data`. Default: a folder in the Hugging Face cache.")
    streaming: bool = _key(False, "Read `data` in its own order, without an index.")
    on_broken: str = _key(
        "error", "`error` ends the run at a broken record. `skip` leaves it out and counts it.", ON_BROKEN
    )
    max_skipped: int = _key(100, "Largest number of skipped records. One more ends the run.")
    on_truncated: str = _key(
        "error",
        "`error` treats an image file that ends too early as broken. `load` trains on what it holds.",
        ON_TRUNCATED,
    )
    max_image_pixels: int | None = _key(
        None, "An image with more pixels is broken. Default: the limit of the image processor."
    )
    image_roots: list[str] | None = field(
        default=None, metadata={"help": "Further folders of images, to which absolute paths and links may lead."}
    )
    image_hosts: list[str] | None = field(
        default=None, metadata={"help": "Hosts from which images at http(s) addresses are fetched."}
    )
    private_image_hosts: list[str] | None = field(
        default=None, metadata={"help": "The same for hosts of a private network or of this machine."}
    )
    eval_data: str | None = _key(None, "Held-out records, in the formats of `data`.")
    eval_samples: int = _key(
        0, "Number of records of `eval_data` that are answered at each evaluation and scored by exact match."
    )
    eval_max_new_tokens: int = _key(32, "Largest number of tokens of such an answer.")
    global_batch_size: int | None = _key(
        None, "Records per optimizer step, over all processes and accumulation steps."
    )
    train: list[str] = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "Parts that are trained; the others are frozen. Default: all, but with LoRA without the "
            "vision tower."
        },
    )
    vision_tower_learning_rate: float | None = _key(
        None, "Learning rate of the vision tower. Default: `learning_rate`."
    )
    projector_learning_rate: float | None = _key(None, "Learning rate of both projectors. Default: `learning_rate`.")
    sampler_learning_rate: float | None = _key(None, "Learning rate of the samplers. Default: `learning_rate`.")
    query_lens: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of latent tokens that training draws from. Default: the list of the model."},
    )
    query_len_draw: str = _key(
        "step",
        "`step` draws one of `query_lens` for a whole step. `micro_batch` draws one for each micro-batch.",
        QUERY_LEN_DRAWS,
    )
    loss_average: str = _key(
        "tokens",
        "`tokens` averages over the tokens of a step. `micro_batches` averages the means of its micro-batches.",
        LOSS_AVERAGES,
    )
    max_length: int | None = _key(
        None, "Longer conversations are truncated on the right, in tokens. Default: the maximum of the tokenizer."
    )
    group_by: str = _key(
        MODALITY_LENGTH,
        "`modality_length` groups records as the authors do, `length` groups records of similar length, `none` "
        "does not.",
        GROUP_BY,
    )
    lora_rank: int = _key(0, "Rank of LoRA in the linear layers of `lora_parts`. 0 trains without LoRA.")
    lora_parts: list[str] | None = field(
        default=None,
        metadata={"help": "Parts that get LoRA and are not trained as a whole. Default: the language model."},
    )
    lora_alpha: float | None = _key(None, "Scale of LoRA. Default: twice the rank.")
    lora_dropout: float = _key(0.05, "Dropout before LoRA.")
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Names of the linear layers that get LoRA. Default: all of `lora_parts`."}
    )
    lora_dora: bool = _key(False, "Use DoRA, which trains the magnitude of weights apart from their direction.")
    lora_rslora: bool = _key(False, "Use rsLoRA, which divides `lora_alpha` by the square root of the rank.")
    lora_bias: str = _key(
        NO_BIAS,
        "Biases that are trained as well: those of layers with LoRA (`lora_only`), or those of `train` (`all`).",
        LORA_BIASES,
    )
    load_in_4bit: bool = _key(False, "Keep the frozen language model in 4 bits (bitsandbytes).")
    load_in_8bit: bool = _key(False, "Keep the frozen language model in 8 bits (bitsandbytes).")
    save_dtype: str = _key(
        "float32", "Data type of the finished model's weights. Checkpoints are always exact.", DTYPE_NAMES
    )
    peak_tflops: float | None = _key(
        None, "Peak of one device in TFLOP/s, for the utilization. Default: the measured rate of a matrix product."
    )

    def check(self) -> None:
        """
        Raises:
            InputError: for an impossible value; names the key, the value and what is allowed.
        """
        for each in fields(OwnArguments):
            if "choices" in each.metadata:
                _allow(each.name, getattr(self, each.name), each.metadata["choices"])
        for name in ("train", "lora_parts"):
            given = getattr(self, name)
            for part in PARTS if given is None else given:
                _allow(name, part, PARTS)
            if given == []:
                raise InputError(f"{name} is empty; allowed: some of {', '.join(PARTS)}.")
        for length in self.query_lens if self.query_lens is not None else [1]:
            if not is_square(length):
                raise InputError(f"query_lens holds {length}; allowed: perfect squares (1, 4, 9, 16, ...).")
        if self.query_lens == []:
            raise InputError("query_lens is empty; allowed: at least one perfect square.")
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} is {value}; allowed: {least} or more.")
        self._check_lora()

    def _check_lora(self) -> None:
        if self.load_in_4bit and not self.lora_rank:
            raise InputError("load_in_4bit is true, but lora_rank is 0; 4-bit weights do not train: set lora_rank.")
        if self.load_in_8bit and not self.lora_rank:
            raise InputError("load_in_8bit is true, but lora_rank is 0; 8-bit weights do not train: set lora_rank.")
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are true; allowed: one of them.")
        if self.load_in_8bit and self.lora_dora:  # seen with PEFT 0.21 and bitsandbytes 0.50 on a CPU
            raise InputError(
                "lora_dora and load_in_8bit are true; allowed: DoRA with load_in_4bit, since measuring 8-bit weights "
                "loses their scales."
            )
        for name in ("lora_parts", "lora_dora", "lora_rslora", "lora_bias"):
            value = getattr(self, name)
            if value not in (None, False, NO_BIAS) and not self.lora_rank:
                raise InputError(f"{name} is {value!r}, but lora_rank is 0; set lora_rank, or leave {name} out.")
        for part in self.adapted_parts:
            if self.train is not None and part not in self.train:
                allowed = f"a list with {part}, lora_parts without it, or lora_rank: 0"
                raise InputError(f"train is {self.train}, but LoRA trains the {part}; allowed: {allowed}.")
        if self.lora_rank and LANGUAGE_MODEL in (self.train or ()) and LANGUAGE_MODEL not in self.adapted_parts:
            allowed = f"lora_parts with {LANGUAGE_MODEL}, or train without it"
            raise InputError(f"lora_parts is {self.lora_parts}, but train has {LANGUAGE_MODEL}; allowed: {allowed}.")

    @property
    def adapted_parts(self) -> tuple[str, ...]:
        """Parts that get LoRA; none without a rank."""
        if not self.lora_rank:
            return ()
        return (LANGUAGE_MODEL,) if self.lora_parts is None else tuple(self.lora_parts)

    @property
    def default_train(self) -> list[str]:
        """Parts that are trained where `train` does not say."""
        if not self.lora_rank:
            return list(PARTS)
        return [part for part in PARTS if part in (PROJECTORS, SAMPLERS, *self.adapted_parts)]


def _allow(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")


@dataclass(frozen=True)
class KeyTypes:
    """What a key may hold: one of some plain types, or nothing. `kinds` of None are left out."""

    kinds: frozenset[type]
    takes_none: bool


@cache
def all_keys() -> Mapping[str, KeyTypes]:
    """List all keys that a recipe can have, by name."""
    return {**transformers_keys(), **keys_of(OwnArguments)}


def transformers_keys() -> dict[str, KeyTypes]:
    """List those of transformers' `TrainingArguments`, by name."""
    folders = (spec.submodule_search_locations if (spec := find_spec("transformers")) is not None else None) or ()
    for folder in folders:
        path = Path(folder) / SOURCE
        tree = ast.parse(path.read_bytes()) if path.is_file() else ast.Module([], [])
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == CLASS and not node.bases:
                return dict(_declared(node))
    from transformers import TrainingArguments  # a version that has it elsewhere

    return keys_of(TrainingArguments)


def keys_of(arguments: Any) -> dict[str, KeyTypes]:
    """List those of a class of arguments, by name."""
    hints = typing.get_type_hints(arguments)
    return {each.name: _key_of(hints[each.name], each.default is None) for each in fields(arguments) if each.init}


def _declared(node: ast.ClassDef) -> Iterator[tuple[str, KeyTypes]]:
    """Names and types of a dataclass's fields, from its source."""
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        default: ast.expr | None = line.value
        if isinstance(default, ast.Call):  # of `field`
            settings = {keyword.arg: keyword.value for keyword in default.keywords}
            if isinstance(init := settings.get("init"), ast.Constant) and init.value is False:
                continue
            default = settings.get("default")
        kinds = frozenset(_written_kinds(line.annotation))
        if str in kinds:  # the other name is an enumeration's, whose values are texts
            kinds &= {*BUILT_IN.values(), type(None)}
        is_none = isinstance(default, ast.Constant) and default.value is None
        yield line.target.id, KeyTypes(kinds - {type(None)}, type(None) in kinds or is_none)


def _written_kinds(hint: ast.expr) -> Iterator[type]:
    """As `_kinds`, of an annotation as it is written: an unknown name is a class that YAML has no value for."""
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
            yield BUILT_IN.get(name, str)  # `Literal`, as a text
    elif isinstance(hint, ast.Name):
        yield BUILT_IN.get(hint.id) or type(hint.id, (), {})
    else:
        yield str


def _key_of(hint: Any, default_is_none: bool) -> KeyTypes:
    kinds = frozenset(_kinds(hint))
    return KeyTypes(kinds - {type(None)}, type(None) in kinds or default_is_none)


def _kinds(hint: Any) -> Iterable[type]:
    """The plain types among which a value may be: of `float | None`, float and NoneType."""
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
    Name the optimizer of a recipe.

    Raises:
        InputError: for one whose memory is not known.
    """
    optimizer = values.get("optim") or DEFAULT_OPTIMIZER
    if optimizer not in OPTIMIZER_BYTES:
        raise InputError(f"optim is {optimizer!r}; plans know {', '.join(OPTIMIZER_BYTES)}.")
    return optimizer
