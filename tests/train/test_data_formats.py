"""Every format gives the same records, at any place and as a stream."""

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from tests.helpers.training_data import (
    FORMATS,
    NUM_RECORDS,
    TEXT_ONLY,
    color,
    make_image,
    make_record,
    write_format,
    write_images,
    write_json,
    write_jsonl,
)
from torch.utils.data import DataLoader

from fusion_hf.common.errors import InputError
from fusion_hf.data import RecordDataset, SampleKey, load_records
from fusion_hf.data import sources as sources_module


def check_item(item: dict, number: int) -> None:
    """The item is what `make_record(number)` says."""
    record = make_record(number)
    roles = {"human": "user", "gpt": "assistant"}
    expected = [
        {"role": roles[turn["from"]], "content": turn["value"].replace("<image>", "")}
        for turn in record["conversations"]
    ]
    assert item["id"] == record["id"]
    assert item["messages"] == expected
    if number == TEXT_ONLY:
        assert item["image"] is None
    else:
        assert item["image"].size == make_image(number).size
        assert item["image"].getpixel((3, 3)) == color(number)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_give_the_same_records(tmp_path: Path, kind: str):
    source = write_format(tmp_path / "data", kind)
    records = load_records(source, root=tmp_path / "data" if kind == "tars" else None, cache=tmp_path / "cache")
    assert isinstance(records, RecordDataset)
    assert len(records) == NUM_RECORDS
    for number in (5, 0, 3, 6, 1, 2, 4):
        check_item(records[number], number)
    with pytest.raises(IndexError):
        records[NUM_RECORDS]
    with pytest.raises(IndexError):
        records[-1]


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_give_the_same_stream(tmp_path: Path, kind: str):
    stream = load_records(write_format(tmp_path, kind), streaming=True).split(epochs=1)
    items = list(stream)
    assert len(items) == NUM_RECORDS
    for number, item in enumerate(items):
        check_item(item, number)


@pytest.mark.parametrize("kind", ["json", "parquet_bytes", "tars"])
def test_workers_give_the_same_as_none(tmp_path: Path, kind: str):
    records = load_records(write_format(tmp_path / "data", kind), cache=tmp_path / "cache")
    keys = [SampleKey(number, 4 + number) for number in (6, 3, 0, 5, 1)]
    loaders = [
        DataLoader(records, sampler=keys, batch_size=2, num_workers=workers, collate_fn=list) for workers in (0, 2)
    ]
    alone, together = ([item for batch in loader for item in batch] for loader in loaders)
    assert len(alone) == len(together) == len(keys)
    for key, one, other in zip(keys, alone, together, strict=True):
        check_item(one, key.index)
        check_item(other, key.index)
        assert one["query_len"] == other["query_len"] == key.query_len


@pytest.mark.parametrize("kind", FORMATS)
def test_pickled_records_are_the_same(tmp_path: Path, kind: str):
    """Workers that are not forked off get them so."""
    root = tmp_path / "data"
    records = load_records(write_format(root, kind), root=None, cache=tmp_path / "cache")
    content = pickle.dumps(records)
    assert len(content) < 10_000
    check_item(pickle.loads(content)[4], 4)  # noqa: S301 (our own)


def test_lengths_are_the_words_of_all_turns(tmp_path: Path):
    records = load_records(write_format(tmp_path / "data", "json"), cache=tmp_path / "cache")
    words = [
        sum(len(turn["value"].split()) for turn in make_record(number)["conversations"])
        for number in range(NUM_RECORDS)
    ]
    expected = [-count if number == TEXT_ONLY else count for number, count in enumerate(words)]
    assert records.lengths.dtype == np.int32
    assert records.lengths.tolist() == expected


def test_no_length_is_zero(tmp_path: Path):
    turns = [{"from": "human", "value": " "}, {"from": "gpt", "value": "x"}]
    record = {"conversations": turns}
    records = load_records(write_json(tmp_path / "a.json", [record]), cache=tmp_path)
    assert records.lengths.tolist() == [-1]
    assert records[0]["id"] == "0"  # the index stands for a missing id


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
    """`datasets` loads them; here it is given a local file in their place."""
    file = write_format(tmp_path, "parquet_bytes")
    load, asked = datasets.load_dataset, []

    def load_dataset(repository: str, split: str, streaming: bool):
        asked.append((repository, split))
        return load(
            "parquet", data_files={split: str(file)}, split=split, streaming=streaming, cache_dir=tmp_path / "hub"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    records = load_records("owner/name:validation", cache=tmp_path / "cache", streaming=streaming)
    items = records.split(epochs=1) if streaming else [records[number] for number in range(len(records))]
    for number, item in enumerate(items):
        check_item(item, number)
    assert number == NUM_RECORDS - 1
    assert set(asked) == {("owner/name", "validation")}


def test_a_hub_data_set_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"nobody/nothing:train cannot be loaded.*OWNER/NAME"):
        load_records("nobody/nothing", cache=tmp_path)


def test_small_windows_find_every_record_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However the bytes of a file fall into the chunks it is read in."""
    file = write_json(tmp_path / "a.json", write_images(tmp_path))
    content = file.read_bytes()
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(sources_module, "CHUNK_BYTES", chunk)
        items = list(sources_module.JsonArray(file, tmp_path).scan())
        assert [item.raw for item in items] == [make_record(number) for number in range(NUM_RECORDS)]
        spans = [content[offset : offset + size] for offset, size in (item.place for item in items)]
        assert [json.loads(span) for span in spans] == [item.raw for item in items]


@pytest.mark.parametrize("write", [write_json, write_jsonl])
def test_a_byte_order_mark_is_no_record(tmp_path: Path, write):
    file = write(tmp_path / f"a{'.json' if write is write_json else '.jsonl'}", write_images(tmp_path))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    records = load_records(file, cache=tmp_path / "cache")
    for number in range(NUM_RECORDS):
        check_item(records[number], number)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "a.json must not be empty"),
        ("a.json", b"[]", "at least one record, got none in .*a.json"),
        ("a.json", b" \n", "a.json must contain a JSON array.*begins with ''"),
        ("a.json", b'{"id": 1}', r"must contain a JSON array.*\.jsonl.*begins with '\{'"),
        ("a.json", b'[{"id": 1}', "expected a comma .* after a record, at byte 10"),
        ("a.json", b'[{"id": 1} {"id": 2}]', "expected a comma"),
        ("a.json", b'[{"id": 1}] x', "unexpected text after the array, at byte 12"),
        ("a.json", b'[{"id": 1}, {"id" 2}]', "is not valid JSON: expected a value .* at byte 12"),
        ("a.json", b'[{"id": 1}, {"id": "\xff"}]', "is not valid UTF-8"),
        ("a.json", b"[" * 200_000, "is not valid JSON: expected a value"),
        ("a.jsonl", b"\n \n", "at least one record, got none in .*a.jsonl"),
        ("a.parquet", b"nothing", "a.parquet is not a Parquet file"),
        ("a.tar", b"nothing" * 1000, "a.tar is not a complete, uncompressed tar"),
        ("a.csv", b"", "a.csv"),
        ("a.txt", b"nothing", r"must be one of .json, .jsonl.*got '.txt'"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_records(tmp_path / name, on_broken="skip", cache=tmp_path / "cache")


def test_missing_files_and_empty_folders(tmp_path: Path):
    with pytest.raises(InputError, match=r"does not exist\. Give a file"):
        load_records(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        load_records("x" * 5000)
    with pytest.raises(InputError, match="does not exist"):
        load_records("a\0b")
    with pytest.raises(InputError, match=r"must contain one of metadata.jsonl"):
        load_records(tmp_path)
    with pytest.raises(InputError, match=r"`data_root` must be .* is not a folder"):
        load_records(tmp_path / "a.json", root=tmp_path / "none")


@pytest.mark.parametrize("cut", [600, 4000])
def test_a_tar_that_was_cut_off(tmp_path: Path, cut: int):
    """A run would train on a part of the data, and nobody know."""
    file = write_format(tmp_path, "tar")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match="not a complete, uncompressed tar"):
        load_records(file, cache=tmp_path / "cache")


def test_a_record_of_a_changed_file_is_an_error(tmp_path: Path):
    file = write_json(tmp_path / "a.json", write_images(tmp_path))
    records = load_records(file, cache=tmp_path / "cache")
    check_item(records[1], 1)
    file.write_bytes(b" " + file.read_bytes())
    with pytest.raises(InputError, match="was changed while it was in use"):
        records[1]
