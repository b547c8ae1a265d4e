"""What a run logs beside Trainer's own figures: the two losses apart, speed, utilisation, waiting for data."""

import time
from dataclasses import dataclass, field

import torch

from fusion_hf.training.distributed import sum_over_ranks

RATE_SIDE = 1024  # of the square matrices whose product is timed on a CPU
RATE_SIDE_ACCELERATOR = 8192
RATE_ROUNDS = 5


@dataclass
class ThroughputMeter:
    """Sums over the steps since the last log, of this process; `report` adds up all processes'.

    Losses and counts stay on their device until then: reading one would wait for the device.
    """

    steps: int = 0
    language_loss: torch.Tensor | float = 0.0
    mapping_loss: torch.Tensor | float = 0.0
    tokens: torch.Tensor | int = 0
    images: torch.Tensor | int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waiting: float = 0.0
    _began: float = field(default=0.0, repr=False)

    def add(
        self,
        language_loss: torch.Tensor,
        mapping_loss: torch.Tensor,
        tokens: torch.Tensor,
        images: torch.Tensor,
        flops: float,
    ) -> None:
        """Add a micro-batch: its shares of the step's losses `()`, its tokens and images `()`, its FLOPs."""
        self.language_loss = self.language_loss + language_loss
        self.mapping_loss = self.mapping_loss + mapping_loss
        self.tokens = self.tokens + tokens
        self.images = self.images + images
        self.flops += flops

    def begin_step(self) -> None:
        self._began = time.perf_counter()

    def batches_arrived(self) -> None:
        self.waiting += time.perf_counter() - self._began

    def end_step(self) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps += 1

    def report(self, peak_flops: float, device: torch.device) -> dict[str, float]:
        """
        Means per step of the losses (parts of the whole batch's, so processes add up), rates over all processes, and
        shares of one: of `peak_flops` (FLOP/s of one device) in use, and of the time spent waiting for data.
        """
        counts = (self.tokens, self.images, self.flops)
        own = (self.language_loss, self.mapping_loss, *counts, self.seconds, self.waiting)
        sums = sum_over_ranks(torch.tensor([*map(float, own), 1.0], dtype=torch.float64), device).tolist()
        language, mapping, tokens, images, flops, seconds, waiting, processes = sums
        wall = max(seconds / processes, 1e-9)
        steps = max(self.steps, 1)
        return {
            "language_loss": language / steps,
            "mapping_loss": mapping / steps,
            "tokens_per_second": tokens / wall,
            "images_per_second": images / wall,
            "model_flops_utilization": flops / wall / (peak_flops * processes),
            "data_wait": waiting / max(seconds, 1e-9),
        }


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of large square matrices: what `model_flops_utilization` is a share of."""
    side = RATE_SIDE if device.type == "cpu" else RATE_SIDE_ACCELERATOR
    left = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(RATE_ROUNDS + 1):  # the first one warms up
        begin = time.perf_counter()
        (left @ left)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best
