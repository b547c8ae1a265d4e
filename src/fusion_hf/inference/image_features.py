"""Features of an image that do not depend on the question, and a cache of them for further questions."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Features = TypeVar("Features")


@dataclass(frozen=True)
class ImageFeatures:
    """The overview's pixels and the features of the four tiles."""

    overview: torch.Tensor  # (1, 1, 3, H, W)
    global_features: torch.Tensor  # (1, D, 2P, 2P)


class ImageFeatureCache(Generic[Features]):
    """
    Keep features of the images that were asked about last: tiles take four fifths of an image's time.

    Args:
        limit: The most that all features together may cost; those that were used longest ago go first.
        cost: Of an image's features; None: one each, so that `limit` is a number of images.
    """

    def __init__(self, limit: int, cost: Callable[[Features], int] | None = None):
        self.limit = limit
        self._cost = cost or (lambda _: 1)
        self._entries: OrderedDict[Hashable, Features] = OrderedDict()

    @property
    def total_cost(self) -> int:
        return sum(map(self._cost, self._entries.values()))

    def collect(self, keys: Sequence[Hashable], encode: Callable[[list[int]], Sequence[Features]]) -> list[Features]:
        """
        Get the features of several images.

        Args:
            keys: Of the images; equal ones have equal features.
            encode: Makes features of the images whose indices in `keys` it is given, all at once.

        Returns:
            The features of each key.
        """
        indices = {key: index for index, key in enumerate(keys) if key not in self._entries}
        if indices:
            self._entries.update(zip(indices, encode(list(indices.values())), strict=True))
        for key in keys:
            self._entries.move_to_end(key)
        collected = [self._entries[key] for key in keys]
        total = self.total_cost
        while total > self.limit:
            total -= self._cost(self._entries.popitem(last=False)[1])
        return collected
