"""What samplers look at of a picture, kept for further questions about it."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch


class WindowCache:
    """
    Windows `(q * w * w, D)` of the pictures that were asked about last: no question guides them, and they take four
    fifths of a picture's time. vLLM's own cache is of pictures with their questions, and has nothing for the next one.

    Args:
        limit: bytes; those that were used longest ago go first.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(windows.nbytes for windows in self._entries.values())

    def collect(
        self, keys: Sequence[Hashable], encode: Callable[[list[int]], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The windows of each key; `encode` makes those of the indices whose keys are new."""
        indices = {key: index for index, key in enumerate(keys) if key not in self._entries}
        if indices:
            self._entries.update(zip(indices, encode(list(indices.values())), strict=True))
        for key in keys:
            self._entries.move_to_end(key)
        collected = [self._entries[key] for key in keys]
        size = self.num_bytes
        while size > self.limit:
            size -= self._entries.popitem(last=False)[1].nbytes
        return collected
