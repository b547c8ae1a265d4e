"""Choose the order of records in training and the number of latent tokens of each step.

Both depend only on the seed and the position. So all processes agree without communication, the number of data workers
has no influence, and a resumed run continues exactly.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Sampler

from fusion_hf.data import SampleKey

LENGTH_WINDOW = 50  # number of steps whose records are sorted together, as in transformers' `group_by_length`
TOKENS_PER_WORD, TURN_TOKENS, BLOCK_MARKS = 1.35, 6, 2  # averages over chat formats and tokenizers


def query_len_of_step(step: int, query_lens: Sequence[int], seed: int, micro_batch: int | None = None) -> int:
    """
    Draw the number of latent tokens of an optimizer step.

    Args:
        step: the step, counted from 0 over all epochs.
        query_lens: the numbers to draw from.
        seed: the seed of the draw.
        micro_batch: the micro-batch of the step (see [`StepLayout`]) if each one has its own number.

    Returns:
        One of `query_lens`.
    """
    key = f"query_len/{seed}/{step}" if micro_batch is None else f"query_len/{seed}/{step}/{micro_batch}"
    return random.Random(key).choice(list(query_lens))


def estimate_tokens(lengths: np.ndarray, turns: np.ndarray, query_lens: Sequence[int]) -> np.ndarray:
    """
    Estimate the number of tokens of each record without its image tokens.

    Args:
        lengths: the words of each record, negative without an image `(num_records,)`.
        turns: the questions of each record `(num_records,)`. Each one has latent tokens if there is an image.
        query_lens: the numbers of latent tokens to draw from.

    Returns:
        The estimates `(num_records,)`.
    """
    latents = np.where(lengths > 0, np.mean(query_lens) + BLOCK_MARKS, 0)
    return np.abs(lengths) * TOKENS_PER_WORD + turns * (TURN_TOKENS + latents)


@dataclass(frozen=True)
class StepLayout:
    """
    How the records of one optimizer step are split: `world_size * accumulation` micro-batches of `batch_size`.

    Micro-batch m of process r has the number `m * world_size + r`, as accelerate distributes them.

    Args:
        batch_size: the number of records per micro-batch.
        world_size: the number of processes.
        accumulation: the number of micro-batches per process and step.
    """

    batch_size: int
    world_size: int = 1
    accumulation: int = 1

    @property
    def global_batch_size(self) -> int:
        """Number of records per step."""
        return self.batch_size * self.world_size * self.accumulation


@dataclass(eq=False)
class StepSampler(Sampler[SampleKey]):
    """
    Yield the keys of the records of an epoch, step by step.

    With `lengths`, a step holds either records with images or records without, and each of its micro-batches holds
    records of similar length. This is the grouping of the authors (LLaVA's `group_by_modality_length`). The last two
    incomplete steps are joined at the end of the epoch and may hold both kinds.

    With `sizes` in addition, all micro-batches of a step hold records of similar size, so that there is little padding
    and processes rarely wait for each other. Out of the records of `LENGTH_WINDOW` steps, the largest form one step,
    and so on. Steps are shuffled, and the incomplete ones come at the end of the epoch.

    Args:
        num_records: the number of records of the data set.
        layout: how a step is split.
        query_lens: the numbers of latent tokens, of which one is drawn for each step.
        seed: the seed of the order and of the draw.
        lengths (`(num_records,)`, *optional*): the words of each record, negative without an image. None uses one
            random permutation.
        sizes (`(num_records,)`, *optional*): the sizes of the records, see `estimate_tokens`. Requires `lengths`.
        per_micro_batch: whether to draw a number of latent tokens for each micro-batch.
        drop_last: whether the data loader leaves out incomplete micro-batches.
    """

    num_records: int
    layout: StepLayout
    query_lens: Sequence[int]
    seed: int
    lengths: np.ndarray | None = None
    sizes: np.ndarray | None = None
    per_micro_batch: bool = False
    drop_last: bool = False
    epoch: int = field(default=0, init=False)

    def set_epoch(self, epoch: int) -> None:
        """
        Set the current epoch, which determines the order.

        Args:
            epoch: the number of the epoch, counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        """
        Return the number of keys of an epoch. A few records are repeated if some process would lack a last
        micro-batch.
        """
        of_all = self.layout.batch_size * self.layout.world_size
        return self.num_records if self.layout.world_size == 1 else -(-self.num_records // of_all) * of_all

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch."""
        if self.drop_last:
            return -(-(len(self) // (self.layout.batch_size * self.layout.world_size)) // self.layout.accumulation)
        return -(-len(self) // self.layout.global_batch_size)

    def __iter__(self) -> Iterator[SampleKey]:
        size, batch_size = self.layout.global_batch_size, self.layout.batch_size
        first_step = self.epoch * self.steps_per_epoch
        for position, index in enumerate(self._complete(self._order())):
            if position % (batch_size if self.per_micro_batch else size) == 0:
                step, place = divmod(position, size)
                micro_batch = place // batch_size if self.per_micro_batch else None
                query_len = query_len_of_step(first_step + step, self.query_lens, self.seed, micro_batch)
            yield SampleKey(index, query_len)

    def _complete(self, order: Iterator[int]) -> Iterator[int]:
        """Yield the indices of the epoch, and repeat as many of the first ones as `__len__` requires."""
        missing = len(self) - self.num_records
        first: list[int] = []
        for index in order:
            if len(first) < missing:
                first.append(index)
            yield index
        for position in range(missing):
            yield first[position % len(first)]

    def _order(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.lengths is None:
            order = generator.permutation(np.arange(self.num_records, dtype=np.uint32))
            yield from (int(index) for index in order)
            return
        size = self.layout.global_batch_size
        modalities = [np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths < 0)]
        shuffled = [generator.permutation(indices.astype(np.uint32)) for indices in modalities if len(indices)]
        if self.sizes is not None:
            yield from self._by_size(shuffled, generator)
            return
        # the last step of each modality, complete or not, comes at the end
        last = [(number, (len(indices) - 1) // size) for number, indices in enumerate(shuffled)]
        steps = [(number, step) for number, count in last for step in range(count)]
        for position in generator.permutation(len(steps)):
            number, step = steps[position]
            yield from self._split(shuffled[number][step * size : (step + 1) * size])
        remaining = [shuffled[number][step * size :] for number, step in last]
        if len(remaining) == 1:
            yield from self._split(remaining[0])
        else:
            yield from (int(index) for index in np.sort(np.concatenate(remaining)))

    def _by_size(self, shuffled: list[np.ndarray], generator: np.random.Generator) -> Iterator[int]:
        """Yield all records of both modalities in steps and micro-batches of similar size."""
        assert self.sizes is not None
        size = self.layout.global_batch_size
        steps, remaining = [], []
        for indices in shuffled:
            complete = len(indices) // size * size
            for begin in range(0, complete, size * LENGTH_WINDOW):
                window = indices[begin : min(begin + size * LENGTH_WINDOW, complete)]
                largest_first = window[np.argsort(-self.sizes[window], kind="stable")]
                steps += np.split(largest_first, len(window) // size)
            remaining.append(indices[complete:])
        for position in generator.permutation(len(steps)):
            yield from (int(index) for index in steps[position])
        rest = np.concatenate(remaining)
        yield from (int(index) for index in rest[np.argsort(-self.sizes[rest], kind="stable")])

    def _split(self, indices: np.ndarray) -> list[int]:
        """
        Split a step into micro-batches with similar numbers of words: each record goes to the shortest one so
        far.
        """
        assert self.lengths is not None
        words = np.abs(self.lengths[indices])
        longest_first = np.argsort(-words, kind="stable")
        parts = self.layout.world_size * self.layout.accumulation
        ordered = indices[longest_first]
        if len(indices) % parts:
            return [int(index) for part in range(parts) for index in ordered[part::parts]]
        capacity = len(indices) // parts
        chunks: list[list[int]] = [[] for _ in range(parts)]
        totals = [0.0] * parts
        for index, count in zip(ordered, words[longest_first], strict=True):
            shortest = totals.index(min(totals))
            chunks[shortest].append(int(index))
            full = len(chunks[shortest]) == capacity
            totals[shortest] = float("inf") if full else totals[shortest] + float(count)
        return [index for chunk in chunks for index in chunk]
