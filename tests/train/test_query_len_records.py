"""Streams and plain sequences of records: every step has its number of latent tokens, whoever reads it."""

import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

from fusion_hf.data import SampleKey, load_records
from fusion_hf.training.query_len_records import QueryLenRecords, QueryLenStream
from fusion_hf.training.sampler import query_len_of_step

QUERY_LENS = [4, 16, 36]
BATCH, ACCUMULATION, WORLD = 2, 3, 2


@pytest.fixture
def file(tmp_path):
    records = [
        {"id": str(i), "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        for i in range(50)
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return path


def take(file, rank: int, workers: int, start: int, batches: int) -> list[list[tuple[str, int]]]:
    stream = load_records(file, streaming=True).split(rank=rank, world_size=WORLD, batch_size=BATCH, start=start)
    keyed = QueryLenStream(stream, ACCUMULATION, QUERY_LENS, seed=5)
    loader = iter(DataLoader(keyed, batch_size=BATCH, num_workers=workers, collate_fn=list))
    return [[(record["id"], record["query_len"]) for record in next(loader)] for _ in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_of_a_step_share_its_query_len_in_all_processes_and_workers(file, workers):
    ranks = [take(file, rank, workers, 0, 9) for rank in range(WORLD)]
    for number, batches in enumerate(zip(*ranks, strict=True)):
        expected = query_len_of_step(number // ACCUMULATION, QUERY_LENS, 5)
        assert {query_len for batch in batches for _, query_len in batch} == {expected}
    order = [identity for batches in zip(*ranks, strict=True) for batch in batches for identity, _ in batch]
    assert order == [str(i) for i in range(36)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_begins_later_goes_on_as_if_it_had_not_stopped(file, workers):
    whole = take(file, 1, 0, 0, 9)
    assert take(file, 1, workers, 2 * ACCUMULATION, 3) == whole[2 * ACCUMULATION :]


def test_plain_records_take_keys_and_have_lengths():
    turns = [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]
    records = QueryLenRecords([{"image": "a.png", "conversations": turns}, {"conversations": turns}], query_len=9)
    assert records[SampleKey(1, 4)] == {"conversations": turns, "query_len": 4}
    assert records[0]["query_len"] == 9
    np.testing.assert_array_equal(records.lengths, [3, -3])
