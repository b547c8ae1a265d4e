"""Profile where the time of a prompt and of decoding goes, by operation."""

from collections.abc import Callable
from typing import Any

import torch
from contestants import Contestant
from torch.profiler import ProfilerActivity, profile
from transformers.generation.streamers import BaseStreamer
from workload import ONE_QUESTION

TOP = 15  # number of operations to list
MICROSECONDS = 1e6

Operations = list[dict[str, Any]]


class DecodingStarts(BaseStreamer):
    """Call a function when `generate` delivers the first token."""

    def __init__(self, function: Callable[[], Any]):
        self.function, self.puts = function, 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the prompt itself comes first
            self.function()

    def end(self) -> None:
        pass


def profile_contestant(contestant: Contestant, new_tokens: int, device: torch.device) -> dict[str, Operations]:
    """
    Return the operations that take the most time, for one prompt and for decoding all tokens but the first.

    `new_tokens` must equal the number of timed tokens, so that a compiled model has a cache of the same length.
    """
    prompt = contestant.prompt(ONE_QUESTION)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    contestant.generate(prompt, new_tokens)  # warms up
    with profile(activities=activities) as prefill:
        contestant.generate(prompt, 1)
    decoding = profile(activities=activities)
    contestant.generate(prompt, new_tokens, streamer=DecodingStarts(decoding.start))
    decoding.stop()
    return {"prefill": operations(prefill, device), "decoding": operations(decoding, device)}


def operations(profiler: profile, device: torch.device) -> Operations:
    """Return calls, seconds without inner operations, and the share of all seconds, in descending order."""
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = [(getattr(event, own), event) for event in profiler.key_averages()]
    total = sum(time for time, _ in spent)
    return [
        {"name": event.key, "calls": event.count, "seconds": time / MICROSECONDS, "share": time / total}
        for time, event in sorted(spent, key=lambda pair: pair[0], reverse=True)[:TOP]
    ]


def describe_operations(profiles: dict[str, Operations]) -> str:
    """Write operations as plain text."""
    lines = []
    for phase, rows in profiles.items():
        lines.append(f"{phase}:")
        lines += [f"  {row['share']:6.1%}  {row['seconds']:.4f} s  {row['calls']:6}  {row['name']}" for row in rows]
    return "\n".join(lines)
