"""What this CPU computes faster, measured in milliseconds, once in a process.

Names of processors and of their instructions do not say it: of two CPUs with the same instructions for bfloat16, one
multiplies twice as fast in it as in float32, the other half as fast.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

TRIALS = 5
IN_FEATURES, OUT_FEATURES = 1024, 2048  # 8 MiB in float32: more than a core's own caches
MANY_ROWS = 128
CLEARLY_FASTER = 0.8  # of the other time: noise must not make the same machine decide otherwise
NOT_SLOWER = 1.2

Computation = Callable[[], torch.Tensor]


def compare_times(first: Computation, second: Computation) -> float:
    """Divide the shortest time of `first` by that of `second`, of alternating calls."""
    first(), second()  # what only first calls do
    times = [(_seconds(first), _seconds(second)) for _ in range(TRIALS)]
    return min(time for time, _ in times) / min(time for _, time in times)


def trial_tensors(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Make what a linear layer multiplies, with results between -4 and 4 and without a draw from torch's generator.

    Returns:
        Rows `(rows, in)`, a weight `(out, in)` and a bias `(out,)`.
    """
    weight = torch.linspace(-1, 1, OUT_FEATURES * IN_FEATURES).view(OUT_FEATURES, IN_FEATURES)
    bias = torch.linspace(-1, 1, OUT_FEATURES)
    return weight[:rows].to(dtype), (weight * 3 / IN_FEATURES).to(dtype), bias.to(dtype)


def is_bfloat16_faster() -> bool:
    """Find out whether this CPU computes prompts clearly faster in bfloat16 than in float32, and tokens not slower."""
    return _is_bfloat16_faster(torch.get_num_threads())


@cache
def _is_bfloat16_faster(threads: int) -> bool:
    def ratio(rows: int) -> float:
        half, full = (_linear(rows, dtype) for dtype in (torch.bfloat16, torch.float32))
        return compare_times(half, full)

    return ratio(MANY_ROWS) < CLEARLY_FASTER and ratio(1) < NOT_SLOWER


def _linear(rows: int, dtype: torch.dtype) -> Computation:
    tensors = trial_tensors(rows, dtype)
    return lambda: nn.functional.linear(*tensors)


def _seconds(function: Computation) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
