"""Batches that are halved when they exceed the memory of a GPU."""

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
    Run batches one after another. If a batch exceeds the memory of a GPU, it and all later ones are halved.

    Args:
        batches: Batches, none of which is empty.
        run: Function that returns the output of a batch.
        refuse: Function that returns the output of a batch with a single item that exceeds the memory, from the batch
            and the reason.

    Yields:
        Outputs, in the order of the items.
    """
    largest: int | None = None  # maximum batch size, once a batch was too large
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
            torch.cuda.empty_cache()  # outside of the handler, because the traceback keeps the tensors alive
            if len(batch) > 1:
                largest = len(batch) // 2
                pending.appendleft(batch)
            else:
                yield refuse(batch, message)
