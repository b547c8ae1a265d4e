"""What tells two states of a model apart in which the tiles of an image have different features."""

import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.model.quantization_fusion import plain_tensors

PEFT_LAYERS = "peft.tuners.tuners_utils"  # imported by whoever adds adapters


@dataclass(frozen=True)
class EncoderState:
    """
    The weights of tower and projector, their adapters, and how pixels are made of images. Two are equal only if
    nothing of these was replaced, moved or written to between them.

    What writes to `weight.data` leaves no trace in a tensor, so that it is not seen here; merging an adapter is.
    """

    values: tuple[Hashable, ...]
    tensors: tuple[torch.Tensor, ...] = field(compare=False, repr=False)  # kept: no others can get their ids

    @classmethod
    def of(cls, model: FusionForConditionalGeneration, processor: FusionProcessor) -> "EncoderState":
        """Read the state of a model and of its processor as they are now."""
        parts = (model.model.vision_tower, model.model.vision_projector)
        tensors = [
            stored
            for part in parts
            for tensor in (*part.parameters(), *part.buffers())
            for stored in plain_tensors(tensor)
        ]
        adapters = [values for part in parts for values in _adapters(part)]
        attention = model.config.vision_config._attn_implementation
        pixels = str(processor.image_processor.to_dict())
        return cls((attention, pixels, *adapters, *map(_identity, tensors)), tuple(tensors))


def _identity(tensor: torch.Tensor) -> Hashable:
    """Changes when a tensor is another one, lies elsewhere, or was written to."""
    version = None if tensor.is_inference() else tensor._version  # inference tensors count no writes
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


def _adapters(part: nn.Module) -> Iterator[Hashable]:
    """Which adapters of its layers are in use, merged, and how much they weigh."""
    if PEFT_LAYERS not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in part.modules():
        if isinstance(module, BaseTunerLayer):
            scaling = vars(module).get("scaling", {})  # of LoRA
            yield (
                tuple(module.active_adapters),
                module.disable_adapters,
                tuple(module.merged_adapters),
                tuple(scaling.items()),
            )
