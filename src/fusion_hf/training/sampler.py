"""In which order records are trained on, and with how many latent tokens each step.

Both follow from the seed and the position alone. So every process knows them without asking, they do not depend on
how many workers load data, and a resumed run goes on exactly where it was.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Sampler

from fusion_hf.data import SampleKey

LENGTH_WINDOW = 50  # steps whose records are sorted together, as transformers' `group_by_length` does
TOKENS_PER_WORD, TURN_TOKENS, BLOCK_MARKS = 1.35, 6, 2  # about, of chat formats and tokenizers


def query_len_of_step(step: int, query_lens: Sequence[int], seed: int, micro_batch: int | None = None) -> int:
    """
    The number of latent tokens of optimizer step `step`, counted from 0 over all epochs; of one of its micro-batches
    (see [`StepLayout`]) where each has its own.
    """
    key = f"query_len/{seed}/{step}" if micro_batch is None else f"query_len/{seed}/{step}/{micro_batch}"
    return random.Random(key).choice(list(query_lens))


def estimate_tokens(lengths: np.ndarray, turns: np.ndarray, query_lens: Sequence[int]) -> np.ndarray:
    """
    About how many tokens a record has beside its image: by how much it is longer than others.

    Args:
        lengths: words of each record, negative without an image `(num_records,)`.
        turns: questions, each of which has latent tokens if there is an image `(num_records,)`.
        query_lens: what the number of latent tokens is drawn from.
    """
    latents = np.where(lengths > 0, np.mean(query_lens) + BLOCK_MARKS, 0)
    return np.abs(lengths) * TOKENS_PER_WORD + turns * (TURN_TOKENS + latents)


@dataclass(frozen=True)
class StepLayout:
    """How the records of one optimizer step are split: `world_size * accumulation` micro-batches of `batch_size`.

    Micro-batch m of process r is number `m * world_size + r`, as accelerate deals them.
    """

    batch_size: int
    world_size: int = 1
    accumulation: int = 1

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size * self.accumulation


@dataclass(eq=False)
class StepSampler(Sampler[SampleKey]):
    """
    The keys of an epoch's records, step by step.

    With `lengths`, a step holds records with images or records without, not both, of about the same length in each
    micro-batch: the authors' grouping (LLaVA's `group_by_modality_length`). Their last two incomplete steps are joined
    at the end of the epoch and may hold both.

    With `sizes` as well, all micro-batches of a step hold records of about the same size, so that little of them is
    padding and no process waits long for another: of each `LENGTH_WINDOW` steps' records, the largest make one step,
    and so on. Steps come in any order, and the incomplete ones at the end of the epoch.

    Args:
        num_records: of the data set.
        layout: how a step is split.
        query_lens: drawn from for each step.
        seed: of the order and of the drawing.
        lengths (`(num_records,)`, *optional*): words of each record, negative without an image. None: the order is
            one random permutation.
        sizes (`(num_records,)`, *optional*): of each record, see `estimate_tokens`; only with `lengths`.
        per_micro_batch: draw from `query_lens` for each micro-batch of a step.
        drop_last: the loader leaves out micro-batches that are not full.
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
        self.epoch = epoch

    def __len__(self) -> int:
        """Records of an epoch; a few come twice where processes could else not all get a last micro-batch."""
        of_all = self.layout.batch_size * self.layout.world_size
        return self.num_records if self.layout.world_size == 1 else -(-self.num_records // of_all) * of_all

    @property
    def steps_per_epoch(self) -> int:
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
        """The epoch's indices, and as many of its first ones again as `__len__` needs."""
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
        # the last step of each modality, complete or not, waits for the end
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
        """All records of the modalities, in steps and micro-batches of about the same size."""
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
        """A step's records in micro-batches of about the same number of words: each goes to the shortest one yet."""
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
