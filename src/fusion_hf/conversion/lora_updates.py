"""LoRA runs: low-rank updates, and the weights that were trained whole beside them."""

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
# settings under which an update is more than W + B A, with the only value that conversion takes
PLAIN_SETTINGS = {"use_dora": False, "modules_to_save": None, "alpha_pattern": None, "bias": "none"}


@dataclass(frozen=True)
class LoraPair:
    """An update `scale * B A` of a weight. `transposed`: the weight is stored as (in, out)."""

    a: StoredTensor  # (r, in)
    b: StoredTensor  # (out, r)
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that the update fits."""
        shape = (self.b.shape[0], self.a.shape[-1])
        return shape[::-1] if self.transposed else shape

    def add_to(self, weight: torch.Tensor, reader: TensorReader) -> torch.Tensor:
        """Return the updated weight, summed in float32, in the type of `weight`."""
        a, b = (reader.load(factor).to(torch.float32) for factor in (self.a, self.b))
        left, right = (a.T, b.T) if self.transposed else (b, a)
        # a copy in any case: the weight may be a view of a mapped file
        return weight.to(torch.float32, copy=True).addmm_(left, right, alpha=self.scale).to(weight.dtype)


def read_lora(folder: Path) -> dict[str, LoraPair]:
    """Read updates of a LoRA run by the name of the weight that they belong to.

    Raises:
        ConversionError: for a missing half of a pair, unknown tensors, or a kind of LoRA that is more than a sum.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    for name, allowed in PLAIN_SETTINGS.items():
        value = settings.get(name) or allowed
        if value != allowed:
            raise ConversionError(f"{folder / ADAPTER_CONFIG}: {name} is {value!r}; allowed: {allowed!r}.")
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ConversionError(f"{folder / ADAPTER_CONFIG}: lora_alpha is {alpha!r}; allowed: a number.")
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
    """Find the file with the updates.

    Raises:
        ConversionError: if there is none.
    """
    for name in ADAPTER_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ConversionError(f"{folder} has {ADAPTER_CONFIG} but none of: {', '.join(ADAPTER_NAMES)}.")


def read_trained_whole(file: Path) -> dict[str, StoredTensor]:
    """Read the weights of `non_lora_trainables.bin` or `mm_projector.bin` by the names of a full checkpoint."""
    stored = read_headers([file])
    names = {key: key.removeprefix(PEFT_PREFIX) for key in stored}
    if any(name.startswith(MODEL_PREFIX * 2) for name in names.values()):
        # one `model.` is PEFT's; without it a head would read `lm_head.weight` again
        names = {key: name.removeprefix(MODEL_PREFIX) for key, name in names.items()}
    return {names[key]: tensor for key, tensor in stored.items()}
