"""Key-value caches that grow without copying the cached tokens.

The layers of transformers concatenate all cached keys and values with those of each new token, which costs as much as
reading a fifth of the weights once. Shapes: B batch, H heads, S cached tokens, N new tokens, D size of a head.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # number of further tokens for which a layer allocates memory each time it grows


class RoomyLayer(DynamicLayer):
    """A cache layer with spare memory behind its last token. It allocates new memory if its tensors are replaced."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._rooms: tuple[torch.Tensor, ...] = ()  # keys and values (B, H, S + at most ROOM, D)
        self._filled: tuple[torch.Tensor, ...] = ()  # the views of both that `keys` and `values` refer to

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append keys and values to the cached ones.

        Args:
            key_states, value_states (`(B, H, N, D)`): Keys and values of the new tokens.

        Returns:
            All keys and all values, each `(B, H, S + N, D)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._append(key_states, value_states)
        return self.keys, self.values

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        old, new = (self.keys, self.values), (key_states, value_states)
        begin = 0 if self.keys.numel() == 0 else self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        if not self._has_room(end):
            self._rooms = tuple(states.new_empty((*states.shape[:-2], end + ROOM, states.shape[-1])) for states in new)
            if begin > 0:
                for room, states in zip(self._rooms, old, strict=True):
                    room[..., :begin, :] = states
        for room, states in zip(self._rooms, new, strict=True):
            room[..., begin:end, :] = states
        self._filled = tuple(room[..., :end, :] for room in self._rooms)
        return self._filled

    def _has_room(self, end: int) -> bool:
        """Return whether the tensors are still views of this layer's memory, with space for `end` tokens."""
        if not self._filled or self.keys is not self._filled[0] or self.values is not self._filled[1]:
            return False  # a new layer, or a layer that was cropped, reordered, moved or repeated
        if self._rooms[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # tensors of inference mode cannot be written outside of it
        return end <= self._rooms[0].shape[-2]


class RoomySlidingLayer(DynamicSlidingWindowLayer, RoomyLayer):
    """A [`RoomyLayer`] with a sliding window. Once the window is full, it behaves like the layer of transformers."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, see [`RoomyLayer.update`]."""
        if self.record_past or self.cumulative_length + key_states.shape[-2] >= self.sliding_window:
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        return RoomyLayer.update(self, key_states, value_states)


def give_room(cache: Cache | None) -> None:
    """
    Make an empty [`DynamicCache`] grow without copies.

    Args:
        cache ([`Cache`], *optional*): The cache, which is changed in place. Other kinds of caches, and caches that
            hold tokens, are left as they are.
    """
    if cache is None or type(cache) is not DynamicCache or cache.get_seq_length() > 0:
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = RoomyLayer()
        elif type(layer) is DynamicSlidingWindowLayer and not layer.record_past:
            cache.layers[index] = RoomySlidingLayer(sliding_window=layer.sliding_window)
