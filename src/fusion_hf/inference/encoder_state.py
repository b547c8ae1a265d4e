"""The state of a model on which the features of an image's tiles depend."""

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
    The weights of the tower and the projector, their adapters, and the settings of the image processor. Two states are
    equal only if none of these was replaced, moved or written to in between.

    Writing to `weight.data` leaves no trace in a tensor, so it is not detected. Merging an adapter is.
    """

    values: tuple[Hashable, ...]
    tensors: tuple[torch.Tensor, ...] = field(compare=False, repr=False)  # kept so that their ids are not reused

    @classmethod
    def of(cls, model: FusionForConditionalGeneration, processor: FusionProcessor) -> "EncoderState":
        """
        Read the current state of a model and its processor.

        Args:
            model: The model.
            processor: Its processor.
        """
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
    """Return a value that changes if a tensor is replaced, moved or written to."""
    version = None if tensor.is_inference() else tensor._version  # inference tensors do not count writes
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


def _adapters(part: nn.Module) -> Iterator[Hashable]:
    """Yield which adapters of the layers are active and merged, and their scaling."""
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
