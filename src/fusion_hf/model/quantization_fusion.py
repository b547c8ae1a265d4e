"""Quantization of FUSION: the modules that stay unquantized, and errors that name missing packages."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

# Modules that stay unquantized unless you choose others: they hold few of the weights, and all inputs of the language
# model depend on them. The patterns match module names from the start.
NOT_QUANTIZED = (
    r".*\bvision_tower",
    r".*\bvision_projector",
    r".*\bvision_projector_back",
    r".*\bvision_sampler",
    "lm_head",
)
SKIP_FIELDS = ("modules_to_not_convert", "llm_int8_skip_modules")  # of torchao and others; of bitsandbytes
LIBRARIES = ("bitsandbytes", "torchao")
LINEAR_4BIT = "Linear4bit"  # name of bitsandbytes' class, since the library may not be installed


class FusionQuantizationMixin:
    """Extends `PreTrainedModel` with a `from_pretrained` that leaves `NOT_QUANTIZED` unquantized by default."""

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """
        Load a model, see [`PreTrainedModel.from_pretrained`].

        Args:
            quantization_config (`dict` or `QuantizationConfigMixin`, *optional*): Quantization of the weights. If it
                does not name modules to skip, the modules in NOT_QUANTIZED are skipped.

        Raises:
            ImportError: If the library for the quantization is not installed.
            ValueError: If `quantization_config` is of another type.
        """
        with name_extra():
            if quantization_config is not None:
                kwargs["quantization_config"] = skip_by_default(quantization_config)
            loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`, a tuple
        for module in model.modules():
            if type(module).__name__ == LINEAR_4BIT:
                module.register_state_dict_pre_hook(put_scales_back)
        return loaded


def skip_by_default(config: dict[str, Any] | QuantizationConfigMixin) -> QuantizationConfigMixin:
    """
    Return a quantization configuration that skips `NOT_QUANTIZED`, unless it already names modules to skip.

    Args:
        config (`dict` or `QuantizationConfigMixin`): Quantization configuration.

    Raises:
        ValueError: If `config` is of another type.
    """
    if not isinstance(config, (dict, QuantizationConfigMixin)):
        allowed = "a configuration such as BitsAndBytesConfig(load_in_8bit=True), or its dict"
        raise ValueError(f"`quantization_config` must be {allowed}, got {config!r}.")
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy(config)
    for name in SKIP_FIELDS:
        if name in vars(config) and not vars(config)[name]:
            setattr(config, name, list(NOT_QUANTIZED))
    return config


@contextmanager
def name_extra() -> Iterator[None]:
    """Add the extra to install to errors about one of `LIBRARIES`, or about a package that it needs."""
    try:
        yield
    except ImportError as error:
        if any(library in str(error) for library in LIBRARIES):
            raise ImportError(f'{error}\nFor quantization, run `pip install "fusion_hf[quant]"`.') from error
        raise


def put_scales_back(layer: Any, prefix: str, keep_vars: bool) -> None:
    """
    Restore the scales of a bitsandbytes 4-bit layer, which its CPU kernel has transposed, for a state dict.

    On a CPU with AVX512-BF16, the first pass packs the weights and transposes the scales. For a state dict,
    bitsandbytes (seen in 0.50.2) only unpacks the weights. The saved model would be wrong, and so would this one.

    Args:
        layer, prefix, keep_vars: Arguments of a state dict pre-hook.
    """
    state = layer.weight.quant_state
    if vars(state).get("packing_format_for_cpu", False) and not state.original_nested:
        state.absmax = state.absmax.T.float().flatten()  # (K / block, N), bfloat16 -> (N * K / block,)


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that store a weight: itself, or the integers, scales and zero points of a quantized one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))
