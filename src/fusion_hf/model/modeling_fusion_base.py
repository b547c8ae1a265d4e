"""What both FUSION models have in common: outputs, loading and saving, and the choice of attention.

Shapes: B batch, S sequence length, D LLM width. Source: FUSION, arXiv 2504.09925.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)

from .compatibility_fusion import CACHE_NAMES
from .configuration_fusion import FusionConfig
from .modeling_fusion_decoder import FUSION_LAYERS
from .quantization_fusion import FusionQuantizationMixin

# the names under which the generic backends of engines put their own attention into a model of transformers
ENGINE_ATTENTION = {"vllm": "vLLM", "sglang": "SGLang", "tgi": "TGI"}
PAGED_ATTENTION = "paged|"  # begins the names of attention that continuous batching uses
# that are there at a time where nobody asks for them: 64 MiB in float32
LOGITS_PER_CHUNK = 2**24
# what tower and language model can be told to use; flash attention needs its package and a GPU
ATTENTION = ("eager", "sdpa", "flex_attention", *(f"flash_attention_{version}" for version in (2, 3, 4)))


# 5.24 renamed `past_key_values` to `cache`, in outputs, in `forward` and in `generate`
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def cache_keyword(cache: Any) -> dict[str, Any]:
    """Return the cache as the keyword argument that this release of transformers uses."""
    return {CACHE_NAME: cache}


def rename_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Return keyword arguments in which the cache has the name that this release of transformers uses.

    Raises:
        ValueError: if they hold a cache under both names.
    """
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    cache = either_cache(*(arguments.get(name) for name in CACHE_NAMES))
    return others if cache is None else others | cache_keyword(cache)


def either_cache(cache: Any, past_key_values: Any) -> Any:
    """
    Return the cache that a caller gave under one of its two names, or None.

    As in transformers, the older name causes a `FutureWarning` where the newer one is in use.

    Raises:
        ValueError: if both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
    if past_key_values is not None and CACHE_NAME != "past_key_values" and not torch.compiler.is_compiling():
        warnings.warn(f"`past_key_values` is deprecated. Use `{CACHE_NAME}` instead.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


@dataclass
class FusionModelOutputWithPast(BaseModelOutputWithPast):
    """
    image_hidden_states (`(B, image_token_grid ** 2, D)`, *optional*): projected image features that the LLM read.
    image_outputs ([`BaseModelOutputWithPooling`], *optional*): what `get_image_features` returns, without a second
        pass: `pooler_output` are the `image_hidden_states`.
    mapping_loss (`()`, *optional*): sum of the two mapping losses, unweighted.
    """

    image_hidden_states: torch.Tensor | None = None
    mapping_loss: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class FusionCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    loss (`()`, *optional*): `language_loss + mapping_loss_weight * mapping_loss`.
    language_loss (`()`, *optional*): mean cross entropy over labelled tokens.
    mapping_loss (`()`, *optional*): sum of the two mapping losses, unweighted.
    logits (`(B, S, vocabulary)`): None with `loss_positions`.
    hidden_states[i] is what LLM layer i reads, samplers of earlier layers applied; the last entry is after the final
    norm. image_hidden_states (`(B, image_token_grid ** 2, D)`, *optional*).
    image_outputs ([`BaseModelOutputWithPooling`], *optional*): see [`FusionModelOutputWithPast`].
    """

    image_hidden_states: torch.Tensor | None = None
    language_loss: torch.Tensor | None = None
    mapping_loss: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


class LossCounts(NamedTuple):
    """
    How many items each mean of the loss is taken over, `()` each. A trainer that splits a batch gives the counts of
    the whole batch with every part, and the parts' losses add up to the whole batch's.
    """

    labels: torch.Tensor
    instruct_tokens: torch.Tensor
    images: torch.Tensor


def chunked_loss(
    head: nn.Module,
    loss_function: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    num_labels: torch.Tensor,
) -> torch.Tensor:
    """
    Compute the language loss of labelled tokens without keeping their logits, which are computed again for gradients.

    Args:
        head: the language head.
        loss_function: of transformers, which divides by `num_items_in_batch`.
        hidden_states (`(M, D)`): before each labelled token. M may be 0.
        labels (`(M,)`): these tokens.
        vocab_size: columns of the logits.
        num_labels (`()`): what the mean is taken over.

    Returns:
        The loss `()`, the same as of all logits at once but for the order of a sum.
    """

    def loss(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss_function(
            logits=head(rows),
            labels=None,
            shift_labels=targets,
            vocab_size=vocab_size,
            num_items_in_batch=num_labels,
        )

    size = max(1, LOGITS_PER_CHUNK // vocab_size)
    *chunks, last = zip(hidden_states.split(size), labels.split(size), strict=True)
    losses = [checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]
    # the backward pass begins with the last one, whose logits need not be computed again
    return torch.stack([*losses, loss(*last)]).sum()


class MappingLossGradient(torch.autograd.Function):
    """
    Return a tensor as it is and give the mapping loss a gradient wherever the tensor gets one.

    A caller that takes hidden states, logits or log-probabilities and makes a loss of its own never sees the mapping
    loss. With this function in its graph, its backward pass adds the gradient of the mapping loss to its own.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, mapping_loss: torch.Tensor, label_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            tensor (any shape): is returned.
            mapping_loss (`()`): weighted.
            label_mask (the tensor's shape, *optional*): which of these log-probabilities are those of labels. The
                gradient of the mapping loss is then added as often as the caller's loss weighs them: once for their
                negative mean, 1/k times for that of one of k accumulated batches. Without it, it is added once.
        """
        ctx.label_mask, ctx.dtype = label_mask, mapping_loss.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,) = gradients
        scale = gradient.new_ones(()) if ctx.label_mask is None else (gradient * ctx.label_mask).abs().sum()
        return gradient, scale.to(ctx.dtype), None


class MappingLossReceiver:
    """
    Carries the mapping loss of a pass to the model's caller, past a `forward` that a trainer put in place of its own.

    It is no list, since hooks that move inputs to a device copy lists.
    """

    def __init__(self) -> None:
        self.mapping_loss: torch.Tensor | None = None


class FusionPreTrainedModel(FusionQuantizationMixin, PreTrainedModel):
    config: FusionConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["FusionVisionLayer", *FUSION_LAYERS]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # Engines that take over attention also take over the loop, drop our keywords, and would answer without samplers.
    _supports_attention_backend = False

    def __init__(self, config: FusionConfig, *args: Any, **kwargs: Any):
        engine = ENGINE_ATTENTION.get(config.text_config._attn_implementation)
        if engine is not None:
            raise ValueError(
                f"{engine}'s transformers backend would answer without FUSION's samplers, fluently and wrongly; "
                "allowed: FUSION's own vLLM plugin, which the package fusion_hf brings (pip install "
                "'fusion_hf[vllm]')."
            )
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        super().post_init()
        # FSDP refuses names of layers that the model does not have
        present = {type(module).__name__ for module in self.modules()}
        known = self._no_split_modules  # a list or a set, as the version of transformers has it
        self._no_split_modules = type(known)(name for name in known if name in present)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """As in transformers; reentrant checkpoints behind frozen weights have right gradients too."""
        super()._set_gradient_checkpointing(enable, partial(_checkpoint, gradient_checkpointing_func), **kwargs)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str | None:
        """As in transformers, which may take a kernel of the Hub instead; an error names what is supported here."""
        with self._naming_supported(attn_implementation):
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in transformers; nothing is changed if one of the parts cannot have its implementation."""
        if isinstance(attn_implementation, dict):  # one name for all is checked before anything is changed
            for name in attn_implementation.values():
                with self._naming_supported(name):
                    self.get_correct_attn_implementation(name)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @contextmanager
    def _naming_supported(self, name: str | None) -> Iterator[None]:
        try:
            _refuse_paged(name)
            yield
        except (ImportError, ValueError) as error:
            is_supported = partial(_is_accepted, self.get_correct_attn_implementation)
            supported = ", ".join(map(repr, filter(is_supported, ATTENTION)))
            raise type(error)(f"attn_implementation is {name!r}; supported here: {supported}. {error}") from error

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the parts' configurations are told the data type of the weights as well."""
        for name in self.config.sub_configs:
            getattr(self.config, name).dtype = self.dtype
        super().save_pretrained(*args, **kwargs)


def _refuse_paged(attn_implementation: str | None) -> None:
    if attn_implementation is not None and attn_implementation.startswith(PAGED_ATTENTION):
        raise ValueError(
            f"`attn_implementation` must not be {attn_implementation!r}: continuous batching would drop FUSION's "
            "samplers."
        )


def check_engine(config: FusionConfig, cache: Any) -> None:
    """
    Check that no engine calls the model in a loop of its own.

    Args:
        config ([`FusionConfig`]): of the model, whose attention an engine may have replaced.
        cache ([`Cache`], *optional*): continuous batching brings one that is no `Cache`.

    Raises:
        ValueError: if one does: its packed rows would be answered without samplers.
    """
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"`{CACHE_NAME}` must be a `Cache` of transformers, got {type(cache).__name__}. Continuous batching is "
            "not possible with FUSION's samplers."
        )
    for part in (config.text_config, config.vision_config):
        _refuse_paged(part._attn_implementation)


def _checkpoint(usual: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
    """A layer's outputs by torch's `checkpoint` with its settings, `usual`."""
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs):
        return usual(layer, *inputs)
    # a reentrant checkpoint gives the layer's own weights a gradient only if an input has one
    return usual(layer, *inputs, use_reentrant=False)


def _is_accepted(choose: Callable[[str], str], name: str) -> bool:
    """Whether transformers' choice of an attention implementation takes this one."""
    try:
        choose(name)
    except (ImportError, ValueError):
        return False
    return True
