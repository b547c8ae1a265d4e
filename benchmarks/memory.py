"""Measure what a call adds to memory, with this package's Python or that of the authors' environment."""

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # resets the peak resident memory of the process on Linux
BYTES_PER_KIB = 1024


def peak_allocated(function: Callable[[], Any], device: torch.device) -> int:
    """
    Return the peak bytes of tensors that one call holds, as the allocator counts them.

    CUDA's allocator records the peak. On the CPU, the profiler records each allocation and release, and their running
    sum is exact and the same in every run. Allocations inside libraries are not included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result  # kept alive, since the result counts as memory of the call
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def peak_resident(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return the peak growth of the process's resident memory during one call, or None if it cannot be measured."""
    if device.type != "cpu" or sys.platform != "linux":
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the call would reuse pages that earlier calls have freed
    CLEAR_REFS.write_text(RESET_PEAK)
    before = resident_status("VmRSS")
    function()
    return resident_status("VmHWM") - before


def resident_status(field: str) -> int:
    """Return a memory field of this process's status in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * BYTES_PER_KIB
