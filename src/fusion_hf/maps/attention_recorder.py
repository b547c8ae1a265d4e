"""Recorder of attention rows while a model answers, for any attention implementation. It keeps only sums of rows.

Shapes: P patches of a tile per side, N = P * P, T question tokens, R turns, q = s * s latent tokens, w window size,
g side of the grid of image tokens, A new tokens, G groups of layers. The batch is one prompt.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_decoder import FusionSampler

EAGER = "eager"  # the only implementation that is not in transformers' table, and that returns its weights
_TABLE = threading.RLock()  # the table belongs to the process, so only one thread records at a time


class RecordedRows(NamedTuple):
    """Recorded attention weights, averaged over heads and, except for `latents`, over the layers of a group."""

    question: torch.Tensor  # (G, T, P, P): from each question token to the patches of the overview
    latents: torch.Tensor  # (samplers, R, s * w, s * w): from all latent tokens to their windows, side by side
    answer: torch.Tensor  # (G, A, g, g): from the position of each new token to the image tokens


# Arguments: the numbers of queries and keys, and a function that returns rows of the weights, averaged over heads.
LayerRecorder = Callable[[int, int, Callable[[slice], torch.Tensor]], None]


def split_layers(layers: range, groups: int) -> tuple[range, ...]:
    """
    Split layers into groups of neighbours with nearly equal sizes.

    Args:
        layers: Indices of the layers.
        groups: Maximum number of groups.
    """
    count = min(groups, len(layers))
    bounds = [layers.start + len(layers) * index // count for index in range(count + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(bounds))


class AttentionRecorder:
    """
    A context manager that records the attention of one `generate` call for one prompt in this thread.

    The model is not changed. Computations of other threads are ignored. Another recorder waits until this one exits.

    Args:
        model: Model with any attention implementation.
        input_ids: Ids of the prompt `(1, S)`.
        layer_groups: Maximum number of groups of layers, for the tower and for the language model.
    """

    def __init__(self, model: FusionForConditionalGeneration, input_ids: torch.Tensor, layer_groups: int):
        config, parts = model.config, model.model
        self.window = config.window_size
        self.num_patches = config.num_patches_per_side**2
        self.image_places = (input_ids[0] == config.image_token_id).nonzero().flatten()  # (g * g)
        # in uniform layers, question tokens attend equally to all patches, so there is nothing to record
        first = 0 if config.early_text_attention == "masked" else config.vision_early_layers
        self.tower_groups = split_layers(range(first, len(parts.vision_tower.layers)), layer_groups)
        self.language_groups = split_layers(range(len(parts.language_model.layers)), layer_groups)
        self._question: list[torch.Tensor | None] = [None] * len(self.tower_groups)  # sums (T, N)
        self._answer: list[list[torch.Tensor]] = [[] for _ in self.language_groups]  # sums (g * g) by new token
        self._latents: dict[int, torch.Tensor] = {}  # by layer, (R, q, w * w)
        self._lengths: dict[int, int] = defaultdict(int)  # of the sequence, by layer
        self._recorders: dict[nn.Module, LayerRecorder] = {}
        for group, layers in enumerate(self.tower_groups):
            for layer in layers:
                self._recorders[parts.vision_tower.layers[layer].self_attn] = partial(
                    self._read_tower, group, layer == layers.start
                )
        for group, layers in enumerate(self.language_groups):
            for layer in layers:
                recorder = partial(self._read_language, group, layer, layer == layers.start)
                self._recorders[parts.language_model.layers[layer].self_attn] = recorder
        self._samplers: dict[int, FusionSampler] = {
            layer: parts.language_model.layers[layer].vision_sampler for layer in sorted(config.sampler_layers)
        }
        self.sampler_layers = tuple(range(layer, layer + 1) for layer in self._samplers)
        self._functions: set[str] = set()  # names of the attention functions to replace
        self._eager: list[nn.Module] = []
        for part in (parts.vision_tower, parts.language_model):
            if part.config._attn_implementation == EAGER:
                self._eager += [module for module in part.modules() if module in self._recorders]
            else:
                self._functions.add(part.config._attn_implementation)
        self._stack = ExitStack()

    def __enter__(self) -> "AttentionRecorder":
        with ExitStack() as stack:
            stack.enter_context(_TABLE)
            self._thread = threading.get_ident()
            for name in self._functions:
                stack.enter_context(_replaced(name, partial(self._attend, ALL_ATTENTION_FUNCTIONS[name])))
            hooks = [module.register_forward_hook(self._after_eager) for module in self._eager]
            for layer, sampler in self._samplers.items():
                hooks.append(sampler.q_proj.register_forward_hook(partial(self._after_query, layer)))
                hooks.append(sampler.k_proj.register_forward_hook(partial(self._after_key, layer)))
            for hook in hooks:
                stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def rows(self) -> RecordedRows:
        """Return what has been recorded. Call it after the pass over a prompt with an image."""
        patches, grid = isqrt(self.num_patches), isqrt(len(self.image_places))
        question = [
            total.unflatten(-1, (patches, patches)) / len(layers)
            for total, layers in zip(self._question, self.tower_groups, strict=True)
            if total is not None
        ]
        answer = [
            torch.stack(totals).unflatten(-1, (grid, grid)) / len(layers)
            for totals, layers in zip(self._answer, self.language_groups, strict=True)
        ]
        latents = [lay_out(self._latents[layer], self.window).cpu() for layer in self._samplers]
        return RecordedRows(
            question=torch.stack([rows.cpu() for rows in question]),
            latents=torch.stack(latents) if latents else torch.zeros(0, 0, 1, 1),
            answer=torch.stack([rows.cpu() for rows in answer]),
        )

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread

    def _read_tower(
        self, group: int, is_first: bool, queries: int, keys: int, weights: Callable[[slice], torch.Tensor]
    ) -> None:
        if queries <= self.num_patches:  # tiles, which are not guided by a question
            return
        rows = weights(slice(self.num_patches, None))[:, : self.num_patches]  # (T, N)
        # the first layer starts a new sum, because long RoPE processes a prompt twice
        total = None if is_first else self._question[group]
        self._question[group] = rows if total is None else total + rows.to(total.device)

    def _read_language(
        self, group: int, layer: int, is_first: bool, queries: int, keys: int, weights: Callable[[slice], torch.Tensor]
    ) -> None:
        self._lengths[layer] = queries if queries > 1 else self._lengths[layer] + 1
        row = weights(slice(-1, None))[0]  # (keys,): of the last token, which predicts the next one
        # the cache of a sliding window has dropped the first keys
        places = self.image_places.to(row.device) - max(self._lengths[layer] - keys, 0)
        seen = torch.where(places >= 0, row[places.clamp(min=0)], 0)
        if is_first:
            self._answer[group].append(seen)
        else:
            self._answer[group][-1] += seen.to(self._answer[group][-1].device)

    def _attend(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Record attention and call the original attention function."""
        if module in self._recorders and self._is_here():
            options = (kwargs.get("scaling"), kwargs.get("sliding_window"))
            self._recorders[module](
                query.shape[2], key.shape[2], partial(mean_rows, query, key, attention_mask, *options)
            )
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    def _after_eager(self, module: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Record eager attention, which returns its weights `(1, heads, queries, keys)`."""
        if self._is_here():
            weights = output[1].detach()
            queries, keys = weights.shape[2:]
            self._recorders[module](queries, keys, lambda rows: weights[0, :, rows].float().mean(0))

    def _after_query(self, layer: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self._is_here():
            self._latents[layer] = output.detach()  # (1, R, q, D), until the keys are available

    def _after_key(self, layer: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Combine the recorded queries with the keys `(1, q, w * w, D)` in `output`."""
        if self._is_here():
            heads = self._samplers[layer].num_heads
            self._latents[layer] = window_weights(self._latents[layer], output.detach(), heads)


@contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace the attention function called `name`."""
    original = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # makes transformers' own entry visible again
        if ALL_ATTENTION_FUNCTIONS.get(name) is not original:
            ALL_ATTENTION_FUNCTIONS[name] = original


def mean_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    scaling: float | None,
    sliding_window: int | None,
    rows: slice,
) -> torch.Tensor:
    """
    Compute some rows of attention weights, averaged over heads.

    Args:
        query: Queries `(1, H, S, d)`.
        key: Keys `(1, Hkv, K, d)`.
        mask: Mask in any form that attention functions of transformers accept: None, additive or boolean
            `(1, 1, S, K)`, a mask of the keys `(1, K)`, or that of flex attention. A causal mask may be omitted,
            because it hides nothing from the requested rows.
        scaling: Factor for the scores. Defaults to `d ** -0.5`.
        sliding_window: Size of the sliding window, if there is one.
        rows: The requested rows.

    Returns:
        The weights `(rows, keys)`.
    """
    groups = query.shape[1] // key.shape[1]
    chosen = query.detach()[:, :, rows]  # (1, H, r, d)
    count, length = chosen.shape[2], key.shape[2]
    chosen = chosen.unflatten(1, (key.shape[1], groups)).flatten(2, 3)  # (1, Hkv, H / Hkv * r, d)
    scores = (chosen @ key.detach().transpose(-1, -2)).float()
    scores = scores.unflatten(2, (groups, count)).flatten(1, 2)  # (1, H, r, K)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    places = torch.arange(query.shape[2], device=query.device)[rows]
    keys = torch.arange(length, device=query.device)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        part = mask[:, :, rows, :length]
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        return scores.softmax(-1)[0].mean(0)
    if isinstance(mask, torch.Tensor):
        scores = scores.masked_fill(~mask[:, None, None, -length:].bool(), -torch.inf)
    elif mask is not None:
        zero = torch.zeros_like(keys[:1])
        scores = scores.masked_fill(~mask.mask_mod(zero, zero, places[:, None], keys), -torch.inf)
    if sliding_window is not None:
        ends = places[:, None] + length - query.shape[2]
        scores = scores.masked_fill(ends - keys >= sliding_window, -torch.inf)
    return scores.softmax(-1)[0].mean(0)


def window_weights(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """
    Compute the attention of latent tokens to their windows, averaged over heads.

    Args:
        query: Queries of the latent tokens `(1, R, q, D)`.
        key: Keys of the windows `(1, q, w * w, D)`.
        heads: Number of attention heads.

    Returns:
        The weights `(R, q, w * w)`.
    """
    query, key = (x[0].unflatten(-1, (heads, -1)) for x in (query, key))  # (R, q, heads, d), (q, w * w, heads, d)
    scores = torch.einsum("rqhd,qwhd->hrqw", query, key).float() * query.shape[-1] ** -0.5
    return scores.softmax(-1).mean(0)


def lay_out(weights: torch.Tensor, window: int) -> torch.Tensor:
    """Arrange the weights of windows `(R, q, w * w)` as they lie in the image: `(R, s * w, s * w)`."""
    side = isqrt(weights.shape[1])
    grid = weights.unflatten(2, (window, window)).unflatten(1, (side, side))  # (R, s, s, w, w)
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
