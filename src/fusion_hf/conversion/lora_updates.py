"""Weights of LoRA runs: low-rank updates, and weights that were trained as a whole."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fusion_hf.conversion.inputs import ADAPTER_CONFIG
from fusion_hf.conversion.model_files import ConversionError, read_json
from fusion_hf.conversion.stored_tensors import StoredTensor, TensorReader, read_headers

ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = "non_lora_trainables.bin"

PEFT_PREFIX, MODEL_PREFIX = "base_model.", "model."
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
# settings that make an update more than W + B A, with the only value that conversion supports
PLAIN_SETTINGS = {"use_dora": False, "modules_to_save": None, "alpha_pattern": None, "bias": "none"}


@dataclass(frozen=True)
class LoraPair:
    """An update `scale * B A` of a weight. `transposed` means that the weight is stored as (in, out)."""

    a: StoredTensor  # (r, in)
    b: StoredTensor  # (out, r)
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight to which the update belongs."""
        shape = (self.b.shape[0], self.a.shape[-1])
        return shape[::-1] if self.transposed else shape

    def add_to(self, weight: torch.Tensor, reader: TensorReader) -> torch.Tensor:
        """
        Add the update to a weight, in float32.

        Args:
            weight: The weight.
            reader: Reader for the factors of the update.

        Returns:
            The updated weight, in the dtype of `weight`.
        """
        a, b = (reader.load(factor).to(torch.float32) for factor in (self.a, self.b))
        left, right = (a.T, b.T) if self.transposed else (b, a)
        # always a copy, because the weight may be a view of a mapped file
        return weight.to(torch.float32, copy=True).addmm_(left, right, alpha=self.scale).to(weight.dtype)


def read_lora(folder: Path) -> dict[str, LoraPair]:
    """
    Read the updates of a LoRA run.

    Args:
        folder: Folder of the run.

    Returns:
        The updates by the names of their weights.

    Raises:
        ConversionError: If a factor is missing, a tensor is unknown, or the kind of LoRA is not supported.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    for name, allowed in PLAIN_SETTINGS.items():
        value = settings.get(name) or allowed
        if value != allowed:
            raise ConversionError(f"{folder / ADAPTER_CONFIG}: `{name}` must be {allowed!r}, got {value!r}.")
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ConversionError(f"{folder / ADAPTER_CONFIG}: `lora_alpha` must be a number, got {alpha!r}.")
    halves: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for key, tensor in read_headers([find_adapter(folder)]).items():
        match = FACTOR.fullmatch(key)
        if match is None or len(tensor.shape) != 2 or 0 in tensor.shape:
            unknown.append(key)
        else:
            halves.setdefault(match[1], {})[match[2]] = tensor
    unknown += [
        tensor.key
        for pair in halves.values()
        for tensor in pair.values()
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]
    ]
    if unknown:
        raise ConversionError(f"{folder} has unknown or unpaired LoRA tensors: {', '.join(unknown)}.")
    return {f"{module}.weight": _pair(half["A"], half["B"], alpha, settings) for module, half in halves.items()}


def _pair(a: StoredTensor, b: StoredTensor, alpha: float, settings: dict[str, object]) -> LoraPair:
    rank = a.shape[0]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return LoraPair(a, b, scale, transposed=bool(settings.get("fan_in_fan_out")))


def find_adapter(folder: Path) -> Path:
    """
    Find the file with the updates.

    Args:
        folder: Folder of the run.

    Raises:
        ConversionError: If there is none.
    """
    for name in ADAPTER_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ConversionError(f"{folder} has {ADAPTER_CONFIG}, but neither of {' and '.join(ADAPTER_NAMES)}.")


def read_trained_whole(file: Path) -> dict[str, StoredTensor]:
    """Read the weights in `non_lora_trainables.bin` or `mm_projector.bin`, by their names in a full checkpoint."""
    stored = read_headers([file])
    names = {key: key.removeprefix(PEFT_PREFIX) for key in stored}
    if any(name.startswith(MODEL_PREFIX * 2) for name in names.values()):
        # one `model.` comes from PEFT; removing it always would turn `model.lm_head` keys into a second
        # `lm_head.weight`
        names = {key: name.removeprefix(MODEL_PREFIX) for key, name in names.items()}
    return {names[key]: tensor for key, tensor in stored.items()}
