"""Reads a few rows of attention while a model answers, whatever computes its attention, and keeps sums of them only.

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

EAGER = "eager"  # the one implementation that is no entry of transformers' table, and that returns its weights
_TABLE = threading.RLock()  # the table is the process's: one thread reads at a time


class RecordedRows(NamedTuple):
    """What was read: weights as they are, means over heads and, but for `latents`, over a group's layers."""

    question: torch.Tensor  # (G, T, P, P): of each question token, over the patches of the overview
    latents: torch.Tensor  # (samplers, R, s * w, s * w): of all latent tokens, window beside window
    answer: torch.Tensor  # (G, A, g, g): where each new token was chosen, over the image tokens


# how many queries and keys an attention has, and a function that gives rows of its weights, mean over heads
LayerRecorder = Callable[[int, int, Callable[[slice], torch.Tensor]], None]


def split_layers(layers: range, groups: int) -> tuple[range, ...]:
    """Neighbouring layers in at most `groups` groups of nearly equal size."""
    count = min(groups, len(layers))
    bounds = [layers.start + len(layers) * index // count for index in range(count + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(bounds))


class AttentionRecorder:
    """
    As a context, reads the attention of everything that `model` computes in this thread: one `generate` of one prompt.

    Nothing in the model changes. What other threads compute meanwhile is not read; another recorder waits.

    Args:
        model: any attention implementation.
        input_ids: the prompt `(1, S)`.
        layer_groups: most groups of layers of the tower, and of the language model.
    """

    def __init__(self, model: FusionForConditionalGeneration, input_ids: torch.Tensor, layer_groups: int):
        config, parts = model.config, model.model
        self.window = config.window_size
        self.num_patches = config.num_patches_per_side**2
        self.image_places = (input_ids[0] == config.image_token_id).nonzero().flatten()  # (g * g)
        # where early layers are uniform, all patches look alike to the question: there is nothing to read
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
        self._functions: set[str] = set()  # names of those that are to be replaced
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
        """Return what was read so far; call it after the pass over a prompt with an image."""
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
        if queries <= self.num_patches:  # tiles, which no question guides
            return
        rows = weights(slice(self.num_patches, None))[:, : self.num_patches]  # (T, N)
        # the first layer begins anew: a prompt may be read twice, as long RoPE does
        total = None if is_first else self._question[group]
        self._question[group] = rows if total is None else total + rows.to(total.device)

    def _read_language(
        self, group: int, layer: int, is_first: bool, queries: int, keys: int, weights: Callable[[slice], torch.Tensor]
    ) -> None:
        self._lengths[layer] = queries if queries > 1 else self._lengths[layer] + 1
        row = weights(slice(-1, None))[0]  # (keys,): of the last token, which chooses the next one
        # a cache of a sliding window has dropped the first keys
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
        """Stands for an attention function, and calls it."""
        if module in self._recorders and self._is_here():
            options = (kwargs.get("scaling"), kwargs.get("sliding_window"))
            self._recorders[module](
                query.shape[2], key.shape[2], partial(mean_rows, query, key, attention_mask, *options)
            )
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    def _after_eager(self, module: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Eager attention returns its weights `(1, heads, queries, keys)`."""
        if self._is_here():
            weights = output[1].detach()
            queries, keys = weights.shape[2:]
            self._recorders[module](queries, keys, lambda rows: weights[0, :, rows].float().mean(0))

    def _after_query(self, layer: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self._is_here():
            self._latents[layer] = output.detach()  # (1, R, q, D), until the keys are there

    def _after_key(self, layer: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Output: keys `(1, q, w * w, D)`."""
        if self._is_here():
            heads = self._samplers[layer].num_heads
            self._latents[layer] = window_weights(self._latents[layer], output.detach(), heads)


@contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Another attention function under `name`."""
    original = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # which shows transformers' own entry again
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
    Some rows `(rows, keys)` of the weights, mean over heads, of queries `(1, H, S, d)` and keys `(1, Hkv, K, d)`.

    The mask is what attention functions of transformers are given: None, `(1, 1, S, K)` to be added or boolean,
    `(1, K)` of keys, or flex attention's. A causal one that is left out hides nothing from the rows that are read.
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
    """Where latent tokens `(1, R, q, D)` look in their windows, keys `(1, q, w * w, D)`: `(R, q, w * w)`."""
    query, key = (x[0].unflatten(-1, (heads, -1)) for x in (query, key))  # (R, q, heads, d), (q, w * w, heads, d)
    scores = torch.einsum("rqhd,qwhd->hrqw", query, key).float() * query.shape[-1] ** -0.5
    return scores.softmax(-1).mean(0)


def lay_out(weights: torch.Tensor, window: int) -> torch.Tensor:
    """Return windows `(R, q, w * w)` where they are in the image: `(R, s * w, s * w)`."""
    side = isqrt(weights.shape[1])
    grid = weights.unflatten(2, (window, window)).unflatten(1, (side, side))  # (R, s, s, w, w)
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
