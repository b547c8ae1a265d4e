"""Data sets whose records carry the number of latent tokens of their step, which a collator in a worker cannot
know.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from fusion_hf.data import RecordDataset, SampleKey, StreamedRecords
from fusion_hf.training.record_lengths import measure_records
from fusion_hf.training.sampler import StepLayout, query_len_of_step


class QueryLenRecords(Dataset):
    """
    A map-style data set around a sequence of records that accepts the keys of `StepSampler`.

    Args:
        records: the records.
        query_len: the number of latent tokens for keys that are plain indices. None lets the collator draw it.
        show_progress: whether to show a progress bar while records are measured.
    """

    def __init__(self, records: Any, query_len: int | None = None, show_progress: bool = False):
        self.records, self.query_len, self.show_progress = records, query_len, show_progress

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        index, query_len = key if isinstance(key, SampleKey) else (key, self.query_len)
        record = self.records[index]
        return record if query_len is None else {**record, "query_len": query_len}

    @cached_property
    def _measured(self) -> np.ndarray:
        return measure_records(self.records, self.show_progress)

    @property
    def lengths(self) -> np.ndarray:
        """Words of each record, negative if it has no image `(len,)`. `StepSampler` groups by these."""
        return self._measured[:, 0]

    @property
    def turns(self) -> np.ndarray:
        """Number of questions of each record `(len,)`."""
        return self._measured[:, 1]


class QueryLenIterable(IterableDataset):
    """
    An iterable data set that adds the number of latent tokens of their step to records, for one process.

    A data set without a length starts again when it ends, and `max_steps` ends the run. A resumed run therefore
    continues with the same count.

    Args:
        records: an iterable data set that distributes its records to workers itself, as those of torch and datasets
            do.
        layout: how a step is split.
        query_lens: the numbers of latent tokens to draw from.
        seed: the seed of the draw, see `query_len_of_step`.
        per_micro_batch: whether to draw for each micro-batch of a step.
    """

    def __init__(
        self, records: Any, layout: StepLayout, query_lens: Sequence[int], seed: int, per_micro_batch: bool = False
    ):
        self.records, self.layout, self.query_lens, self.seed = records, layout, query_lens, seed
        self.per_micro_batch = per_micro_batch
        self.epoch = 0
        self.rank = 0  # the data loader distributes the records to processes

    def __len__(self) -> int:
        """Return the length of the records. Raise a `TypeError` if they have none."""
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of records that have a length. Others count their epochs themselves."""
        if self._has_length:
            self.epoch = epoch

    @property
    def _has_length(self) -> bool:
        return isinstance(self.records, Sized)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        layout, start = self.layout, self._start
        for batch, record in _with_batches(self._passes(), layout.batch_size):
            step, place = divmod(start + batch, layout.accumulation)
            micro_batch = place * layout.world_size + self.rank if self.per_micro_batch else None
            yield {**record, "query_len": query_len_of_step(step, self.query_lens, self.seed, micro_batch)}

    @property
    def _start(self) -> int:
        """Number of micro-batches in earlier epochs. The last step of an epoch may have fewer."""
        steps = -(-len(self) // self.layout.global_batch_size) if self._has_length else 0
        return self.epoch * steps * self.layout.accumulation

    def _passes(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count(self.epoch):
            if isinstance(self.records, HasEpochs):
                self.records.set_epoch(epoch)
            is_empty = True
            for record in self.records:
                is_empty = False
                yield record
            if is_empty or self._has_length:
                return


class QueryLenStream(QueryLenIterable):
    """
    Records of a stream that distributes them to processes itself, starting at one of their micro-batches.

    Args:
        records: the records of one process.
        accumulation: the number of micro-batches per step.
        *drawing: `query_lens` and `seed` of [`QueryLenIterable`].
        **settings: `per_micro_batch` of [`QueryLenIterable`].
    """

    def __init__(self, records: StreamedRecords, accumulation: int, *drawing: Any, **settings: Any):
        layout = StepLayout(records.batch_size, records.world_size, accumulation)
        super().__init__(records, layout, *drawing, **settings)
        self.rank = records.rank

    @property
    def _start(self) -> int:
        return self.records.start

    def _passes(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)


@runtime_checkable
class HasEpochs(Protocol):
    """A data set that is reshuffled in each epoch."""

    def set_epoch(self, epoch: int) -> None: ...


class FixedQueryLenIterable(IterableDataset):
    """
    Records of an iterable data set, all with the same number of latent tokens.

    Args:
        records: the iterable data set.
        query_len: the number of latent tokens.
    """

    def __init__(self, records: Any, query_len: int):
        self.records, self.query_len = records, query_len

    def __len__(self) -> int:
        """Return the length of the records. Raise a `TypeError` if they have none."""
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({**record, "query_len": self.query_len} for record in self.records)


def _with_batches(records: Iterable[dict[str, Any]], batch_size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of this worker with the number of their batch. The workers' batches are used in turn."""
    info = get_worker_info()
    workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
    for position, record in enumerate(records):
        yield worker + position // batch_size * workers, record


def with_query_lens(records: Any, query_len: int | None = None, show_progress: bool = False) -> Any:
    """
    Wrap records for the trainer, as a data set that accepts the keys of `StepSampler` or as an iterable one.

    Args:
        records: a sequence of records, a data set, or a dictionary of these.
        query_len: the number of latent tokens of all records. None leaves it to a sampler or the trainer.
        show_progress: whether to show a progress bar while records are measured, see `measure_records`.

    Returns:
        The data set, or a dictionary of them.
    """
    if records is None:
        return None
    if isinstance(records, dict):
        return {name: with_query_lens(named, query_len, show_progress) for name, named in records.items()}
    if isinstance(records, IterableDataset):
        return records if query_len is None else FixedQueryLenIterable(records, query_len)
    if isinstance(records, RecordDataset) and query_len is None:
        return records
    return QueryLenRecords(records, query_len, show_progress)
