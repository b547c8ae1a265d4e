"""Trials of what this CPU computes faster. They take milliseconds, once per process.

The names of a processor and of its instructions do not tell which is faster. Of two CPUs with the
same bfloat16 instructions, one multiplies twice as fast in bfloat16 as in float32, and the other half as fast.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

TRIALS = 5
IN_FEATURES, OUT_FEATURES = 1024, 2048  # 8 MiB in float32, more than the caches of one core
MANY_ROWS = 128
CLEARLY_FASTER = 0.8  # ratio of times: noise must not change the decision on the same machine
NOT_SLOWER = 1.2

Computation = Callable[[], torch.Tensor]


def compare_times(first: Computation, second: Computation) -> float:
    """Return the shortest time of `first`, divided by that of `second`, over alternating calls."""
    first(), second()  # warm-up
    times = [(_seconds(first), _seconds(second)) for _ in range(TRIALS)]
    return min(time for time, _ in times) / min(time for _, time in times)


def trial_tensors(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Create the inputs of a linear layer, with results from -4 to 4, without using torch's random generator.

    Args:
        rows: Number of rows.
        dtype: Dtype of all tensors.

    Returns:
        Rows `(rows, in)`, a weight `(out, in)` and a bias `(out,)`.
    """
    weight = torch.linspace(-1, 1, OUT_FEATURES * IN_FEATURES).view(OUT_FEATURES, IN_FEATURES)
    bias = torch.linspace(-1, 1, OUT_FEATURES)
    return weight[:rows].to(dtype), (weight * 3 / IN_FEATURES).to(dtype), bias.to(dtype)


def is_bfloat16_faster() -> bool:
    """Return whether this CPU processes prompts clearly faster in bfloat16 than in float32, and tokens no slower."""
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
    """Return the wall time of one call in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
