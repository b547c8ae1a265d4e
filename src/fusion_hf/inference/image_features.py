"""Features of an image that do not depend on the question."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch

from fusion_hf.model.modeling_fusion_vision import adaptive_max_pool


@dataclass(frozen=True)
class ImageFeatures:
    """
    Pixels of the overview and features of the four tiles. The features are a map `(1, D, 2P, 2P)` for any number of
    latent tokens, or a map that is pooled for `query_len` latent tokens, see [`pool_map`].
    """

    overview: torch.Tensor  # (1, 1, 3, H, W)
    global_features: torch.Tensor  # (1, D, side, side)

    @property
    def nbytes(self) -> int:
        """Size of both tensors in bytes."""
        return self.overview.nbytes + self.global_features.nbytes


def join_features(features: Sequence[ImageFeatures]) -> dict[str, torch.Tensor]:
    """
    Join the features of a batch of images to model inputs.

    Args:
        features: Features of each image, whose maps have the same size.

    Returns:
        `pixel_values` `(B, 1, 3, H, W)` and `global_features` `(B, D, side, side)`.
    """
    return {
        "pixel_values": torch.cat([each.overview for each in features]),
        "global_features": torch.cat([each.global_features for each in features]),
    }


def pool_map(global_features: torch.Tensor, query_len: int, window_size: int) -> torch.Tensor:
    """
    Pool maps to the resolution that the model needs for a number of latent tokens. The model's outputs do not change.

    The maximum over a latent token's part of the map equals the maximum over its windows, whatever their sizes are.

    Args:
        global_features: Maps `(B, D, 2P, 2P)`.
        query_len: Number of latent tokens per question.
        window_size: Side of the window of a latent token.

    Returns:
        Maps `(B, D, s, s)` with the side `isqrt(query_len) * window_size`, or the input if it is not larger.
    """
    side = isqrt(query_len) * window_size
    return global_features if side >= global_features.shape[-1] else adaptive_max_pool(global_features, side)
