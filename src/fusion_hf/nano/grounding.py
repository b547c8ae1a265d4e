"""Training of `fusion-nano` before stage 1: which words each patch of an image shows.

FUSION starts from a SigLIP tower, which relates images to words, and from an LLM, which knows words. nano starts from
noise, and while its patches look alike to the language model, it cannot learn what the questions ask for. Therefore
tower and projector first learn, with SigLIP's sigmoid loss and drawn images, to map each patch to the embeddings of
the words that describe it. No questions are read yet, and only drawn images are seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from fusion_hf.drawing.drawn_images import CANVAS_SIDE, COLORS, DIRECTIONS, SHAPES, WHITE, WORDS, DrawnImage, direction
from fusion_hf.model.configuration_fusion import NUM_TILES, TILES_PER_SIDE
from fusion_hf.model.image_processing_fusion import FusionImageProcessor
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_vision import FusionProjector, FusionVisionModel

MIDDLE = "shape"  # word of the patch with the centre of a shape, so that shapes can be counted
TILE_WORDS = (*COLORS, *SHAPES, *ascii_lowercase, MIDDLE)
OVERVIEW_WORDS = (*DIRECTIONS, *WORDS)  # a tile shows only a part of what they describe
PATCH_WORDS = (*TILE_WORDS, *OVERVIEW_WORDS)
LEAST_COVER = 0.05  # minimum share of a patch that a shape or letter covers for the patch to show it
FIRST_BIAS = -4.0  # most words do not apply

_INDEX = {word: index for index, word in enumerate(PATCH_WORDS)}


def patch_words(spec: DrawnImage, side: int) -> np.ndarray:
    """
    Find the words that describe what each patch of a drawn image shows.

    These are the colour, the kind or letter, the whole written word, and the direction of each of two shapes.

    Args:
        spec: The image.
        side: Number of patches per side.

    Returns:
        Zeros and ones `(side, side, PATCH_WORDS)`.
    """
    labels = np.zeros((side, side, len(PATCH_WORDS)), dtype=np.float32)
    for index, part in enumerate(spec.parts()):
        cover = np.asarray(part.mask.resize((side, side), Image.Resampling.BOX))
        for word in (part.color, part.name, *_overview_words(spec, index)):
            labels[cover > LEAST_COVER * WHITE, _INDEX[word]] = 1
    for shape in spec.shapes:
        column, row = (min(side - 1, int(place * side / CANVAS_SIDE)) for place in shape.center)
        labels[row, column, _INDEX[MIDDLE]] = 1
    return labels


def _overview_words(spec: DrawnImage, part: int) -> list[str]:
    if spec.word is not None:
        return [spec.word.text]
    relation = direction(spec.shapes[part], spec.shapes[1 - part]) if spec.category == "spatial" else None
    return [relation] if relation is not None else []


def tile_words(spec: DrawnImage, side: int) -> np.ndarray:
    """Return the `patch_words` of the four tiles and the overview, in order: `(5, side * side, words)`."""
    fine = patch_words(spec, TILES_PER_SIDE * side).reshape(TILES_PER_SIDE, side, TILES_PER_SIDE, side, -1)
    tiles = fine.transpose(0, 2, 1, 3, 4).reshape(NUM_TILES, side * side, -1)
    return np.concatenate([tiles, patch_words(spec, side).reshape(1, side * side, -1)])


class PatchDataset(Dataset):
    """Drawn images and the words of their patches. `side` is the number of patches per side of a tile."""

    def __init__(self, specs: Sequence[DrawnImage], image_processor: FusionImageProcessor, side: int):
        self.specs, self.image_processor, self.side = specs, image_processor, side

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `pixel_values` `(5, 3, H, W)` and `labels` `(5, N, words)` of an image."""
        spec = self.specs[index]
        pixel_values = self.image_processor(spec.render(), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(tile_words(spec, self.side))}


@dataclass
class GroundingOutput(ModelOutput):
    """
    loss (`()`): Sigmoid losses, summed over words and averaged over patches.
    logits (`(B, 5, N, words)`): How well each word describes what each patch shows.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class WordGrounding(nn.Module):
    """Tower and projector of a model, which are trained in place, and the embeddings of `PATCH_WORDS`."""

    tower: FusionVisionModel
    projector: FusionProjector
    words: torch.Tensor
    asked: torch.Tensor

    def __init__(self, model: FusionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.vision_projector
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        ids = [_token_ids(word, tokenizer) for word in PATCH_WORDS]
        self.register_buffer("words", torch.stack([embeddings.weight[row].mean(0) for row in ids]).detach())
        asked = torch.ones(NUM_TILES + 1, 1, len(PATCH_WORDS))
        asked[:NUM_TILES, :, len(TILE_WORDS) :] = 0
        self.register_buffer("asked", asked)
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.full((len(PATCH_WORDS),), FIRST_BIAS))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> GroundingOutput:
        """
        Compute the loss for images from a [`PatchDataset`].

        Args:
            pixel_values (`(B, 5, 3, H, W)`): Tiles and overviews.
            labels (`(B, 5, N, words)`): Words of the patches.
        """
        projected = self.projector(self.tower(pixel_values.flatten(0, 1)).features)  # (5 B, N, D)
        logits = self.scale * (projected @ self.words.T) + self.bias
        logits = logits.unflatten(0, pixel_values.shape[:2])
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none") * self.asked
        return GroundingOutput(losses.sum(-1).mean(), logits)


def _token_ids(word: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of a word at the start of a text and after a space, if it is a single token there."""
    spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
    ids = [spelling[0] for spelling in spellings if len(spelling) == 1]
    if not ids:
        raise ValueError(
            f"The word {word!r} must be a single token of the vocabulary, got {len(spellings[0])} tokens."
        )
    return ids
