"""Linear layers computed by oneDNN, if that is faster than torch's default on this CPU.

torch passes float32 products to MKL, which computes a single row on one thread if the CPU is not from Intel, and
applies activations in a separate pass. oneDNN, which torch includes as well, uses all threads and applies GELU to each
block while it is in the caches.
"""

import platform
from functools import cache, partial

import torch
from torch import nn
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.models.siglip.modeling_siglip import SiglipMLP

from fusion_hf.inference.cpu_speed import CLEARLY_FASTER, Computation, compare_times, trial_tensors

PROCESSORS = ("x86_64", "AMD64")  # processors on which this was measured
GELUS = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}  # oneDNN's names by those in configurations
SMALLEST_WEIGHT = 2**16  # elements: products with smaller weights take less time than the call
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of a trial


def use_onednn(model: nn.Module) -> None:
    """
    Let oneDNN compute a model's linear layers on a CPU, in place, if that is faster there.

    The GELU of the vision tower is fused with the product before it. float32 products use oneDNN if it is clearly
    faster for single rows, which the first call measures in some milliseconds. Values agree except for the last bits.
    If oneDNN does not apply (gradients, autocast, `torch.compile`, exports, other devices, quantized weights, layers
    with hooks), the layers compute as before. State dict, files and copies stay the same. [`ChatModel.load`] calls
    this function on a CPU. To leave a model unchanged, wrap the call in `torch.backends.mkldnn.flags(enabled=False)`.

    Args:
        model: Model with its weights.

    Example:
        >>> from fusion_hf import FusionForConditionalGeneration, nano_path, use_onednn
        >>> model = FusionForConditionalGeneration.from_pretrained(nano_path())
        >>> use_onednn(model)
    """
    if platform.machine() not in PROCESSORS or not torch.backends.mkldnn.enabled:
        return
    for module in model.modules():
        # exact types, because a subclass computes something else
        if type(module) is nn.Linear and _is_usual(module) and module.weight.numel() >= SMALLEST_WEIGHT:
            if module.weight.dtype == torch.float32 and _rows_are_faster(torch.get_num_threads()):
                module.__class__ = OneDNNLinear
        elif type(module) is SiglipMLP:
            config: SiglipVisionConfig = module.config
            if config.hidden_act in GELUS and _gelu_agrees():
                module.__class__ = OneDNNSiglipMLP


class OneDNNLinear(nn.Linear):
    """A linear layer whose product is computed by oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the layer for `(..., in_features)`. The result is `(..., out_features)`."""
        if input.dtype == torch.float32 and _applies(input, self):
            return _linear(input, self.weight, self.bias)
        return super().forward(input)


class OneDNNSiglipMLP(SiglipMLP):
    """An MLP of the vision tower whose first product and GELU are one operation."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the MLP for `(B, N, Dv)`. The result has the same shape."""
        first = self.fc1
        if (
            isinstance(first, nn.Linear)
            and _is_usual(first)
            and _is_unwatched(first)
            and _is_unwatched(self.activation_fn)
            and _applies(hidden_states, first)
        ):
            return self.fc2(_linear(hidden_states, first.weight, first.bias, GELUS[self.config.hidden_act]))
        return super().forward(hidden_states)


def _linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
) -> torch.Tensor:
    """Multiply `(..., in)` by `(out, in)` to `(..., out)`, with the operator that torch.compile uses."""
    if gelu is None:
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "gelu", [], gelu)


def _is_usual(layer: nn.Linear) -> bool:
    """Return whether a layer computes with plain weights, and not with quantized or distributed ones."""
    return (
        type(layer.weight) is nn.Parameter
        and type(layer) in (nn.Linear, OneDNNLinear)
        and "forward" not in vars(layer)
    )


def _is_unwatched(module: nn.Module) -> bool:
    """Return whether a module has no hooks on its inputs and outputs."""
    return not module._forward_hooks and not module._forward_pre_hooks


def _applies(rows: torch.Tensor, layer: nn.Linear) -> bool:
    """Return whether oneDNN may compute a product now."""
    weight, bias = layer.weight, layer.bias
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(rows) is torch.Tensor  # not a tensor of a tracer
        and type(weight) is nn.Parameter
        and rows.device.type == weight.device.type == "cpu"
        and rows.dtype == weight.dtype
        and rows.dtype in TOLERANCE
        and weight.is_contiguous()
        and (bias is None or bias.is_contiguous())  # the operator assumes a contiguous bias
        and rows.dim() > 1
        and rows.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


@cache
def _rows_are_faster(threads: int) -> bool:
    """Return whether oneDNN computes a float32 row clearly faster with `threads` threads, and with the same values."""
    rows, weight, bias = trial_tensors(1, torch.float32)

    def usual() -> torch.Tensor:
        return nn.functional.linear(rows, weight, bias)

    def by_onednn() -> torch.Tensor:
        return _linear(rows, weight, bias)

    return _agree(usual, by_onednn) and compare_times(by_onednn, usual) < CLEARLY_FASTER


@cache
def _gelu_agrees() -> bool:
    """Return whether oneDNN's products with GELU match torch's."""
    for dtype in TOLERANCE:
        rows, weight, bias = trial_tensors(1, dtype)
        product = nn.functional.linear(rows, weight, bias)
        for name, algorithm in GELUS.items():
            if not _agree(partial(ACT2FN[name], product), partial(_linear, rows, weight, bias, algorithm)):
                return False
    return True


def _agree(usual: Computation, by_onednn: Computation) -> bool:
    """Return whether torch has the private operator with these arguments, and it gives the usual values."""
    expected = usual()
    try:
        found = by_onednn()
    except (AttributeError, RuntimeError, TypeError):
        return False
    tolerance = TOLERANCE[expected.dtype]
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
