"""Common parts of both FUSION models: outputs, losses, loading and saving, and the choice of attention.

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

# Names under which generic backends of inference engines register their own attention for models of transformers.
ENGINE_ATTENTION = {"vllm": "vLLM", "sglang": "SGLang", "tgi": "TGI"}
PAGED_ATTENTION = "paged|"  # prefix of the attention implementations of continuous batching
# Number of logits that exist at a time if the caller does not ask for logits: 64 MiB in float32.
LOGITS_PER_CHUNK = 2**24
# Attention implementations of the tower and the language model. Flash attention needs its package and a GPU.
ATTENTION = ("eager", "sdpa", "flex_attention", *(f"flash_attention_{version}" for version in (2, 3, 4)))


# 5.24 renamed `past_key_values` to `cache`, in outputs, in `forward` and in `generate`
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def cache_keyword(cache: Any) -> dict[str, Any]:
    """Return keyword arguments with the cache under the name that this release of transformers uses."""
    return {CACHE_NAME: cache}


def rename_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Rename the cache in keyword arguments to the name that this release of transformers uses.

    Args:
        arguments (`dict`): Keyword arguments.

    Returns:
        `dict`: The keyword arguments with at most one cache.

    Raises:
        ValueError: If the arguments hold a cache under both names.
    """
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    cache = either_cache(*(arguments.get(name) for name in CACHE_NAMES))
    return others if cache is None else others | cache_keyword(cache)


def either_cache(cache: Any, past_key_values: Any) -> Any:
    """
    Return the cache that a caller passed under one of its two names, or None.

    As in transformers, the older name causes a `FutureWarning` in releases that use the newer one.

    Args:
        cache, past_key_values ([`Cache`], *optional*): The cache under its newer and its older name.

    Raises:
        ValueError: If both are passed.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("You must pass at most one of `cache` and `past_key_values`, two names of one argument.")
    if past_key_values is not None and CACHE_NAME != "past_key_values" and not torch.compiler.is_compiling():
        warnings.warn(f"`past_key_values` is deprecated. Use `{CACHE_NAME}` instead.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


@dataclass
class FusionModelOutputWithPast(BaseModelOutputWithPast):
    """
    image_hidden_states (`(B, image_token_grid ** 2, D)`, *optional*): Projected image features that the language model
        reads.
    image_outputs ([`BaseModelOutputWithPooling`], *optional*): Output of `get_image_features`, without a second pass.
        Its `pooler_output` are the `image_hidden_states`.
    mapping_loss (`()`, *optional*): Unweighted sum of the two mapping losses.
    """

    image_hidden_states: torch.Tensor | None = None
    mapping_loss: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class FusionCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    loss (`()`, *optional*): `language_loss + mapping_loss_weight * mapping_loss`.
    language_loss (`()`, *optional*): Mean cross entropy over labelled tokens.
    mapping_loss (`()`, *optional*): Unweighted sum of the two mapping losses.
    logits (`(B, S, vocabulary)`): Scores of the language head. None with `loss_positions`.
    hidden_states (*optional*): Entry i is the input of LLM layer i, after the samplers of earlier layers. The last
        entry follows the final norm.
    image_hidden_states (`(B, image_token_grid ** 2, D)`, *optional*): See [`FusionModelOutputWithPast`].
    image_outputs ([`BaseModelOutputWithPooling`], *optional*): See [`FusionModelOutputWithPast`].
    """

    image_hidden_states: torch.Tensor | None = None
    language_loss: torch.Tensor | None = None
    mapping_loss: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


class LossCounts(NamedTuple):
    """
    Number of items in each mean of the loss, `()` each. A trainer that splits a batch passes the counts of the whole
    batch with every part, so that the losses of the parts add up to the loss of the whole batch.
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
    Compute the language loss of labelled tokens without keeping their logits. The backward pass computes them again.

    Args:
        head: Language head.
        loss_function: Loss function of transformers, which divides by `num_items_in_batch`.
        hidden_states (`(M, D)`): Hidden states before each labelled token. M may be 0.
        labels (`(M,)`): Labelled tokens.
        vocab_size: Number of columns of the logits.
        num_labels (`()`): Denominator of the mean.

    Returns:
        `()`: The loss. It equals the loss of all logits at once, except for the order of a sum.
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
    # the backward pass starts with the last chunk, whose logits need not be computed again
    return torch.stack([*losses, loss(*last)]).sum()


class MappingLossGradient(torch.autograd.Function):
    """
    Returns a tensor unchanged, and adds the gradient of the mapping loss wherever the tensor gets a gradient.

    Callers that compute a loss of their own from hidden states, logits or log-probabilities never see the mapping
    loss. With this function in their graph, the backward pass adds its gradient to theirs.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, mapping_loss: torch.Tensor, label_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Return `tensor` unchanged.

        Args:
            tensor (any shape): Hidden states, logits or log-probabilities.
            mapping_loss (`()`): Weighted mapping loss.
            label_mask (the tensor's shape, *optional*): Mask of the log-probabilities that belong to labels. The
                gradient of the mapping loss is then scaled by the weight of these in the caller's loss: by 1 for their
                negative mean, by 1/k for one of k accumulated batches. Without a mask, it is added once.
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
    Carries the mapping loss of a pass to the caller of the model, past a `forward` that a trainer has replaced.

    It is not a list, because hooks that move inputs to a device copy lists.
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
    # Engines that replace the attention also replace the loop, drop our keywords, and would run without samplers.
    _supports_attention_backend = False

    def __init__(self, config: FusionConfig, *args: Any, **kwargs: Any):
        engine = ENGINE_ATTENTION.get(config.text_config._attn_implementation)
        if engine is not None:
            raise ValueError(
                f"FUSION does not support {engine}'s transformers backend, which would run without its samplers and "
                "give wrong answers. Use FUSION's own vLLM plugin (pip install 'fusion_hf[vllm]')."
            )
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        super().post_init()
        # FSDP raises an error for layer names that do not occur in the model
        present = {type(module).__name__ for module in self.modules()}
        known = self._no_split_modules  # a list or a set, depending on the release of transformers
        self._no_split_modules = type(known)(name for name in known if name in present)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Enable checkpointing as transformers does, with correct reentrant gradients behind frozen weights."""
        super()._set_gradient_checkpointing(enable, partial(_checkpoint, gradient_checkpointing_func), **kwargs)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str | None:
        """Check an implementation as transformers does, and name the supported ones in errors."""
        with self._naming_supported(attn_implementation):
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """
        Set the attention implementation, see [`PreTrainedModel.set_attn_implementation`].

        Nothing is changed if one of the sub-models does not support its implementation.

        Args:
            attn_implementation (`str` or `dict`): Name of an implementation, or names by sub-model.

        Raises:
            ValueError, ImportError: If an implementation is not supported. The message names the supported ones.
        """
        if isinstance(attn_implementation, dict):  # transformers checks a single name before it changes anything
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
            raise type(error)(
                f"`attn_implementation` must be one of {supported} here, got {name!r}. {error}"
            ) from error

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, see [`PreTrainedModel.save_pretrained`]. Sub-configurations get the dtype of the weights."""
        for name in self.config.sub_configs:
            getattr(self.config, name).dtype = self.dtype
        super().save_pretrained(*args, **kwargs)


def _refuse_paged(attn_implementation: str | None) -> None:
    if attn_implementation is not None and attn_implementation.startswith(PAGED_ATTENTION):
        raise ValueError(
            f"`attn_implementation` must not be {attn_implementation!r}, because continuous batching would run "
            "without FUSION's samplers."
        )


def check_engine(config: FusionConfig, cache: Any) -> None:
    """
    Check that no inference engine calls the model in a loop of its own.

    Args:
        config ([`FusionConfig`]): Configuration of the model, whose attention an engine may have replaced.
        cache ([`Cache`], *optional*): Cache of the call. Continuous batching passes another kind of object.

    Raises:
        ValueError: If an engine does. The model would answer its packed rows without samplers.
    """
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"`{CACHE_NAME}` must be a `Cache` of transformers, got {type(cache).__name__}. FUSION's samplers do not "
            "support continuous batching."
        )
    for part in (config.text_config, config.vision_config):
        _refuse_paged(part._attn_implementation)


def _checkpoint(usual: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer through torch's `checkpoint`, called with the settings in `usual`."""
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs):
        return usual(layer, *inputs)
    # a reentrant checkpoint computes gradients of the layer's weights only if an input requires one
    return usual(layer, *inputs, use_reentrant=False)


def _is_accepted(choose: Callable[[str], str], name: str) -> bool:
    """Return whether transformers accepts an attention implementation."""
    try:
        choose(name)
    except (ImportError, ValueError):
        return False
    return True
