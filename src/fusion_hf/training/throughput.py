"""Measure what a run logs in addition to Trainer: both losses, speed, utilization, and time spent waiting for data."""

import time
from dataclasses import dataclass, field

import torch

from fusion_hf.training.distributed import sum_over_ranks

RATE_SIDE = 1024  # side of the square matrices that are multiplied on a CPU
RATE_SIDE_ACCELERATOR = 8192
RATE_ROUNDS = 5


@dataclass
class ThroughputMeter:
    """
    Sum up measurements of this process since the last log. `report` adds up all processes.

    Losses and counts stay on their device until then, since reading one would wait for the device.
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
        """
        Add a micro-batch.

        Args:
            language_loss (`()`): its share of the step's language loss.
            mapping_loss (`()`): its share of the step's mapping loss.
            tokens (`()`): its number of tokens.
            images (`()`): its number of images.
            flops: its FLOPs.
        """
        self.language_loss = self.language_loss + language_loss
        self.mapping_loss = self.mapping_loss + mapping_loss
        self.tokens = self.tokens + tokens
        self.images = self.images + images
        self.flops += flops

    def begin_step(self) -> None:
        """Start the measurement of a step."""
        self._began = time.perf_counter()

    def batches_arrived(self) -> None:
        """Record that the batches of the step have arrived."""
        self.waiting += time.perf_counter() - self._began

    def end_step(self) -> None:
        """End the measurement of a step."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1

    def report(self, peak_flops: float, device: torch.device) -> dict[str, float]:
        """
        Return the means per step of both losses, the rates over all processes, and the shares of peak FLOP/s and
        waiting time.

        Args:
            peak_flops: the peak of one device in FLOP/s.
            device: the device on which the processes add up their measurements.

        Returns:
            The values by log key.
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
    """
    Measure the rate of a product of large square matrices, the denominator of `model_flops_utilization`.

    Args:
        device: the device.
        dtype: the dtype of the matrices.

    Returns:
        The rate in FLOP/s.
    """
    side = RATE_SIDE if device.type == "cpu" else RATE_SIDE_ACCELERATOR
    left = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(RATE_ROUNDS + 1):  # the first round is a warm-up
        begin = time.perf_counter()
        (left @ left)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best
