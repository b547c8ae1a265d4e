"""Records that know the number of latent tokens of their step, which a collator in a worker cannot know."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from fusion_hf.training.answers import text_of
from fusion_hf.training.collator import images_of, record_to_messages
from fusion_hf.training.data import RecordDataset, SampleKey, StreamedRecords
from fusion_hf.training.sampler import query_len_of_step


class KeyedRecords(Dataset):
    """
    A sequence of records as a data set that takes `StepSampler`'s keys.

    Args:
        query_len: of keys that are plain indices. None: the collator draws.
    """

    def __init__(self, records: Any, query_len: int | None = None):
        self.records, self.query_len = records, query_len

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        index, query_len = key if isinstance(key, SampleKey) else (key, self.query_len)
        record = self.records[index]
        return record if query_len is None else {**record, "query_len": query_len}

    @cached_property
    def lengths(self) -> np.ndarray:
        """Words of each record, negative without a picture `(len,)`: what `StepSampler` groups by."""
        return np.array([_words(record) for record in self.records], dtype=np.int32)


class KeyedStream(IterableDataset):
    """
    A stream's records with the number of latent tokens of their step.

    Args:
        records: of one process, from one of its micro-batches on.
        accumulation: micro-batches per step.
        query_lens, seed: see `query_len_of_step`.
    """

    def __init__(self, records: StreamedRecords, accumulation: int, query_lens: Sequence[int], seed: int):
        self.records, self.accumulation, self.query_lens, self.seed = records, accumulation, query_lens, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        for position, record in enumerate(self.records):
            batch = self.records.start + worker + position // self.records.batch_size * workers
            query_len = query_len_of_step(batch // self.accumulation, self.query_lens, self.seed)
            yield {**record, "query_len": query_len}


def keyed(records: Any, query_len: int | None = None) -> Any:
    """`records` as a data set that takes `StepSampler`'s keys."""
    takes_keys = records is None or isinstance(records, RecordDataset | IterableDataset)
    return records if takes_keys and (query_len is None or records is None) else KeyedRecords(records, query_len)


def _words(record: dict[str, Any]) -> int:
    messages = record_to_messages(record)
    count = max(1, sum(len(text_of(message["content"]).split()) for message in messages))
    return count if images_of(messages) else -count
