"""Features of an image that do not depend on the question."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch

from fusion_hf.model.modeling_fusion_vision import adaptive_max_pool


@dataclass(frozen=True)
class ImageFeatures:
    """
    The overview's pixels and the features of the four tiles: a map `(1, D, 2P, 2P)` for any number of latent tokens,
    or one that is pooled for `query_len` of them, see `pool_map`.
    """

    overview: torch.Tensor  # (1, 1, 3, H, W)
    global_features: torch.Tensor  # (1, D, side, side)

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.overview.nbytes + self.global_features.nbytes


def join_features(features: Sequence[ImageFeatures]) -> dict[str, torch.Tensor]:
    """Return what the model takes of the images of a batch, whose maps have one side."""
    return {
        "pixel_values": torch.cat([each.overview for each in features]),
        "global_features": torch.cat([each.global_features for each in features]),
    }


def pool_map(global_features: torch.Tensor, query_len: int, window_size: int) -> torch.Tensor:
    """
    Reduce maps to what the model sees of them with a number of latent tokens, which makes no difference to it.

    The maximum over a latent token's part of the map is that over its windows, whatever their sides are.

    Args:
        global_features: `(B, D, 2P, 2P)`.
        query_len: Latent tokens per question.
        window_size: Side of a latent token's windows.

    Returns:
        `(B, D, s, s)` of the side `isqrt(query_len) * window_size`, or the maps themselves if they are no larger.
    """
    side = isqrt(query_len) * window_size
    return global_features if side >= global_features.shape[-1] else adaptive_max_pool(global_features, side)
