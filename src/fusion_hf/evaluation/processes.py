"""The processes of a run, under `accelerate launch` or torchrun: who they are, and what they tell each other."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch import distributed

PATIENCE = timedelta(days=2)  # for the slowest process, and for one that waits for a judge
# what lmms-eval, which asks the environment, takes for the only process
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's rank, and how many there are."""

    rank: int
    count: int

    @classmethod
    def start(cls) -> "Processes":
        """Meet the others. They exchange few words, so gloo will do beside any device."""
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if count > 1:
            distributed.init_process_group("gloo", timeout=PATIENCE)
        return cls(rank, count)

    def gather(self, value: T) -> list[T]:
        """Gather everybody's value, in the order of ranks; waits for all."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        distributed.all_gather_object(values, value)
        return values

    def end(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while."""
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
