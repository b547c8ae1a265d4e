"""Quantization of FUSION: what it leaves alone, declared by the model itself, and errors that say what is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

# What quantization leaves alone unless it is told otherwise: few of the weights, and all that the LLM sees depends on
# them. Patterns of module names, which match from the start.
NOT_QUANTIZED = (
    r".*\bvision_tower",
    r".*\bvision_projector",
    r".*\bvision_projector_back",
    r".*\bvision_sampler",
    "lm_head",
)
SKIP_FIELDS = ("modules_to_not_convert", "llm_int8_skip_modules")  # torchao's and others'; bitsandbytes'
LIBRARIES = ("bitsandbytes", "torchao")
LINEAR_4BIT = "Linear4bit"  # bitsandbytes' class, by its name because the library may be missing


class FusionQuantizationMixin:
    """In front of `PreTrainedModel`: a `from_pretrained` that knows NOT_QUANTIZED."""

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """As in transformers; a `quantization_config` without modules to leave alone leaves NOT_QUANTIZED alone."""
        with name_extra():
            if quantization_config is not None:
                kwargs["quantization_config"] = skip_by_default(quantization_config)
            loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # beside it, the keys that were missing
        for module in model.modules():
            if type(module).__name__ == LINEAR_4BIT:
                module.register_state_dict_pre_hook(put_scales_back)
        return loaded


def skip_by_default(config: dict[str, Any] | QuantizationConfigMixin) -> QuantizationConfigMixin:
    """
    Return a quantization configuration that leaves NOT_QUANTIZED alone, unless it says itself what it leaves alone.

    Raises:
        ValueError: if it is neither a configuration nor one's dict.
    """
    if not isinstance(config, (dict, QuantizationConfigMixin)):
        allowed = "a configuration of transformers, such as BitsAndBytesConfig(load_in_8bit=True), or its dict"
        raise ValueError(f"quantization_config is {config!r}; allowed: {allowed}.")
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy(config)
    for name in SKIP_FIELDS:
        if name in vars(config) and not vars(config)[name]:
            setattr(config, name, list(NOT_QUANTIZED))
    return config


@contextmanager
def name_extra() -> Iterator[None]:
    """Where one of LIBRARIES, or what it needs, is missing, the error names the extra that installs all of it."""
    try:
        yield
    except ImportError as error:
        if any(library in str(error) for library in LIBRARIES):
            raise ImportError(f'{error}\nQuantization needs the extra: pip install "fusion_hf[quant]"') from error
        raise


def put_scales_back(layer: Any, prefix: str, keep_vars: bool) -> None:
    """
    Before the state dict of a bitsandbytes layer of 4 bits is made: undo what its CPU kernel did to the scales.

    The first pass on a CPU with AVX512-BF16 packs the weights and transposes the scales. bitsandbytes (seen in 0.50.2)
    unpacks only the weights for a state dict, after which the model, and what was saved of it, would be wrong.
    """
    state = layer.weight.quant_state
    if vars(state).get("packing_format_for_cpu", False) and not state.original_nested:
        state.absmax = state.absmax.T.float().flatten()  # (K / block, N), bfloat16 -> (N * K / block,)


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield what a weight is stored as: itself, or a quantized one's integers, scales and zero points."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))
