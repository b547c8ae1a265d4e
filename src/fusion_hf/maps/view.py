"""Maps over an image: positions of their cells, and the words to which they belong."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusion_hf.model.configuration_fusion import FusionConfig


class View(NamedTuple):
    """
    How a grid of cells lies on an image, which is resized to a square without keeping its aspect ratio.

    Attributes:
        tiles_per_side: 1 for the overview, 2 for the four tiles.
        coverage: Share of a tile's side that is covered by patches. The rest at the right and lower edges is smaller
            than a patch.
        width, height: Size of the image in pixels.
    """

    tiles_per_side: int
    coverage: float
    width: int
    height: int

    @classmethod
    def of(cls, config: FusionConfig, tiles_per_side: int, size: tuple[int, int]) -> "View":
        """
        Create the view that a model has of an image.

        Args:
            config: Configuration of the model.
            tiles_per_side: 1 for the overview, 2 for the four tiles.
            size: Width and height of the image in pixels.
        """
        vision = config.vision_config
        return cls(tiles_per_side, config.num_patches_per_side * vision.patch_size / vision.image_size, *size)

    def resize(self, values: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """
        Resize maps to the pixels of the image, bilinearly between the centres of cells. Values are not rescaled.

        Args:
            values: Maps `(..., h, w)`.
            size: Width and height of the result. Defaults to the size of the image.

        Returns:
            Maps `(..., H, W)`.
        """
        width, height = size or (self.width, self.height)
        rows, columns = self._weights(values.shape[-2], height), self._weights(values.shape[-1], width)
        return rows @ values @ columns.T

    def _weights(self, cells: int, pixels: int) -> np.ndarray:
        """Compute the weights `(pixels, cells)` of the cells at each pixel along a side."""
        places = (np.arange(pixels) + 0.5) / pixels * self.tiles_per_side
        tiles = np.floor(places)
        inside = np.minimum((places - tiles) / self.coverage, 1)
        positions = ((tiles + inside) / self.tiles_per_side * cells - 0.5).clip(0, cells - 1)
        before = np.floor(positions).astype(int)
        share = positions - before
        weights = np.zeros((pixels, cells), dtype=np.float32)
        np.add.at(weights, (np.arange(pixels), before), 1 - share)
        np.add.at(weights, (np.arange(pixels), np.minimum(before + 1, cells - 1)), share)
        return weights


class Word(NamedTuple):
    """A word and its tokens, the rows from `first` to before `end` of a [`Maps`]."""

    text: str
    first: int
    end: int


@dataclass(frozen=True, eq=False)
class Maps:
    """
    Attention maps over an image.

    Attributes:
        values: Maps `(G, R, h, w)` in float32, by group of layers and by row (a token or a turn).
        layers: Layers of each group, over which `values` are averaged.
        words: Words to which the rows belong.
        view: Position of the cells on the image.
    """

    values: np.ndarray
    layers: tuple[range, ...]
    words: tuple[Word, ...]
    view: View

    def of_word(self, word: Word) -> np.ndarray:
        """Return the mean map of a word's tokens, `(G, h, w)`."""
        return self.values[:, word.first : word.end].mean(1)

    def on_image(self, word: Word, size: tuple[int, int] | None = None) -> np.ndarray:
        """
        Return the map of a word at the pixels of the image.

        Args:
            word: The word.
            size: Width and height of the result. Defaults to the size of the image.

        Returns:
            Maps `(G, H, W)`.
        """
        return self.view.resize(self.of_word(word), size)


def find_words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[Word, ...]:
    """
    Find the words of a text and their tokens. Special tokens belong to no word.

    Args:
        tokenizer: Tokenizer of the model.
        ids: Ids of the text.
    """
    special = set(tokenizer.all_special_ids)
    bounds: list[list[int]] = []
    read: list[int] = []
    length = 0
    for index, token in enumerate(ids):
        if token in special:
            continue
        read.append(token)
        text = tokenizer.decode(read)
        begins = text[length : length + 1].isspace()
        length = len(text)
        if not bounds or begins or bounds[-1][1] != index:
            bounds.append([index, index + 1])
        else:
            bounds[-1][1] = index + 1
    words = (Word(tokenizer.decode(ids[first:end]).strip(), first, end) for first, end in bounds)
    return tuple(word for word in words if word.text)
