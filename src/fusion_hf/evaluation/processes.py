"""The processes of a run under `accelerate launch` or torchrun, and how they exchange values."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch import distributed

PATIENCE = timedelta(days=2)  # timeout for the slowest process, and for one that waits for a judge
# environment variables that make lmms-eval treat this process as the only one
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The rank of this process, and the number of processes."""

    rank: int
    count: int

    @classmethod
    def start(cls) -> "Processes":
        """Join the group of processes. It uses gloo on any device, since little data is exchanged."""
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if count > 1:
            distributed.init_process_group("gloo", timeout=PATIENCE)
        return cls(rank, count)

    def gather(self, value: T) -> list[T]:
        """
        Collect a value of each process, in the order of ranks. This waits for all processes.

        Args:
            value: the value of this process.
        """
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        distributed.all_gather_object(values, value)
        return values

    def end(self) -> None:
        """Leave the group of processes."""
        if self.count > 1:
            distributed.destroy_process_group()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """
    Set environment variables while the context is active.

    Args:
        values: the variables.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
