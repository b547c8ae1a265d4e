"""Batches that become smaller when they exceed the memory of a GPU."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")
Output = TypeVar("Output")


def run_halving(
    batches: Iterable[list[Item]], run: Callable[[list[Item]], Output], refuse: Callable[[list[Item], str], Output]
) -> Iterator[Output]:
    """
    Run batches one after the other, in halves from the first one on that exceeds the memory of a GPU.

    Args:
        batches: None of them is empty.
        run: Makes an output of a batch.
        refuse: Makes an output of a batch of one item that needs too much memory by itself, and of the reason.

    Yields:
        Outputs, in the order of the items.
    """
    largest: int | None = None  # what batches are cut to, once one was too large
    for whole in batches:
        pending = deque([whole])
        while pending:
            batch = pending.popleft()
            if largest is not None and len(batch) > largest:
                pending.extendleft([batch[largest:], batch[:largest]])
                continue
            try:
                output = run(batch)
            except torch.OutOfMemoryError as error:
                message = f"it needs too much memory: {error}"
            else:
                yield output
                continue
            torch.cuda.empty_cache()  # outside of the handler, whose traceback holds the tensors
            if len(batch) > 1:
                largest = len(batch) // 2
                pending.appendleft(batch)
            else:
                yield refuse(batch, message)
