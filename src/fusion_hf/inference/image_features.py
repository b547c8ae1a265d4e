"""Features of an image that do not depend on the question."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ImageFeatures:
    """What does not depend on the question: the overview's pixels and the features of the four tiles."""

    overview: torch.Tensor  # (1, 1, 3, H, W)
    global_features: torch.Tensor  # (1, D, 2P, 2P)
