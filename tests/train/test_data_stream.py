"""Streams: ranks and workers share the records out exactly, epoch after epoch, from any micro-batch on."""

from itertools import islice
from pathlib import Path

import pytest
from tests.helpers.training_data import make_record, write_images, write_jsonl, write_tar
from torch.utils.data import DataLoader

from fusion_hf.common.errors import InputError
from fusion_hf.data import StreamedRecords, load_records

COUNT, BATCH = 23, 2


def make_stream(folder: Path, **arguments) -> StreamedRecords:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    write_jsonl(folder / "a.jsonl", [{"id": number, "conversations": turns} for number in range(COUNT)])
    stream = load_records(folder / "a.jsonl", streaming=True, **arguments)
    assert isinstance(stream, StreamedRecords)
    return stream


def batches(stream: StreamedRecords, workers: int = 0, count: int | None = None) -> list[list[int]]:
    loader = DataLoader(stream, batch_size=stream.batch_size, num_workers=workers, collate_fn=list)
    return [[int(item["id"]) for item in batch] for batch in islice(loader, count)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_ranks_and_workers_partition_exactly(tmp_path: Path, workers: int):
    world = 3
    stream = make_stream(tmp_path)
    found = [
        batches(stream.split(rank=rank, world_size=world, batch_size=BATCH, epochs=1), workers)
        for rank in range(world)
    ]
    for rank, of_rank in enumerate(found):
        for number, batch in enumerate(of_rank):
            first = (number * world + rank) * BATCH
            assert batch == list(range(first, min(first + BATCH, COUNT)))
    assert sorted(record for of_rank in found for batch in of_rank for record in batch) == list(range(COUNT))


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_each_other_and_runs_resume(tmp_path: Path, workers: int):
    stream = make_stream(tmp_path)
    whole = batches(stream.split(rank=1, world_size=2, batch_size=BATCH), count=30)
    order = [record % COUNT for record in range(10 * COUNT)]
    assert whole == [order[4 * number + 2 : 4 * number + 4] for number in range(30)]
    resumed = stream.split(rank=1, world_size=2, batch_size=BATCH, start=13)
    assert batches(resumed, workers, count=17) == whole[13:]


def test_as_many_passes_as_asked_for(tmp_path: Path):
    stream = make_stream(tmp_path).split(batch_size=5, epochs=3)
    assert [record for batch in batches(stream) for record in batch] == list(range(COUNT)) * 3


def test_broken_records_keep_their_place(tmp_path: Path):
    """So the ranks agree about the order without reading each other's records."""
    records = write_images(tmp_path)
    records[1]["conversations"], records[4]["image"] = [], "none.png"
    file, skipped = write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "skipped.jsonl"
    stream = load_records(file, streaming=True, on_broken="skip", skipped_file=skipped).split(epochs=2)
    items = list(stream)
    assert [item["id"] for item in items] == [record["id"] for record in records] * 2
    assert [number for number, item in enumerate(items) if "skipped" in item] == [1, 4, 8, 11]
    assert stream.num_skipped == len(skipped.read_text(encoding="utf-8").splitlines()) == 2
    with pytest.raises(InputError, match=r"a.jsonl, record 1 \(id 'id1'\): empty conversation"):
        list(load_records(file, streaming=True).split(epochs=1))
    with pytest.raises(InputError, match="max_skipped` = 1 records"):
        list(load_records(file, streaming=True, on_broken="skip", max_skipped=1).split(epochs=1))


def test_mixtures_are_streamed_in_their_order(tmp_path: Path):
    make_stream(tmp_path)
    write_tar(tmp_path / "b.tar", range(2))
    (tmp_path / "m.yaml").write_text(
        "datasets: [{json_path: b.tar}, {json_path: a.jsonl, sampling_strategy: 'first:3'}]", encoding="utf-8"
    )
    stream = load_records(tmp_path / "m.yaml", streaming=True).split(epochs=1)
    assert [item["id"] for item in stream] == [make_record(0)["id"], make_record(1)["id"], "0", "1", "2"]


@pytest.mark.parametrize("strategy", ["end:3", "random:3", "first:10%"])
def test_strategies_that_need_the_number_of_records(tmp_path: Path, strategy: str):
    make_stream(tmp_path)
    (tmp_path / "m.yaml").write_text(
        f"datasets: [{{json_path: a.jsonl, sampling_strategy: '{strategy}'}}]", encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"entry 1: `sampling_strategy` must be all or first:N .*when streaming, got"):
        load_records(tmp_path / "m.yaml", streaming=True)


def test_an_empty_stream_ends(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"got none in .*a.jsonl"):
        next(iter(load_records(tmp_path / "a.jsonl", streaming=True)))
    for wrong in ({"rank": 2, "world_size": 2}, {"batch_size": 0}, {"start": -1}):
        with pytest.raises(ValueError):
            make_stream(tmp_path).split(**wrong)
