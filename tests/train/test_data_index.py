"""The index: made once, whole or not at all, and in memory that does not grow with the records."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tests.helpers.training_data import NUM_RECORDS, make_record, write_format, write_images, write_json

from fusion_hf.common.errors import InputError
from fusion_hf.data import index as index_module
from fusion_hf.data import load_records
from fusion_hf.data.sources import JsonArray, JsonLines
from fusion_hf.data.table_sources import Table
from fusion_hf.data.tar_shards import TarRecords

RECORDS_TO_KILL, ROWS = 50_000, 1000
SECONDS = 120  # a hung process fails its test
MANY, SPOTS = 5_000_000, 20_000
MAX_BYTES = 1_500_000_000  # resident, at any time


def indexes(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.arrow"))


def write_many(path: Path, count: int) -> None:
    """Records of which each has an answer of its own, as `many_record` says."""
    templates = [json.dumps(many_record(rest)).replace(f"r{rest}", "r%d") for rest in range(5)]
    templates = [line.replace(f"picture {rest}?", "picture %d?") for rest, line in enumerate(templates)]
    templates = [line.replace(f"There are {rest}.", "There are %d.") + "\n" for rest, line in enumerate(templates)]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            stream.write(templates[number % 5] % (number, number, number))


def many_record(number: int) -> dict:
    answer = f"There are {number}." + " And more." * (number % 5)
    turns = [{"from": "human", "value": f"How many things are in picture {number}?"}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", "conversations": turns}


def test_an_index_is_made_once(tmp_path: Path):
    file, cache = write_json(tmp_path / "a.json", write_images(tmp_path)), tmp_path / "cache"
    load_records(file, cache=cache)
    (made,) = indexes(cache)
    before = made.stat().st_mtime_ns
    for _ in range(2):
        assert len(load_records(file, cache=cache)) == NUM_RECORDS
    assert indexes(cache) == [made] and made.stat().st_mtime_ns == before
    assert not list(cache.glob("*.draft"))


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_a_changed_file_is_read_again(tmp_path: Path, kind: str):
    file, cache = write_format(tmp_path / "one", kind), tmp_path / "cache"
    assert load_records(file, cache=cache)[0]["id"] == "id0"
    status = file.stat()
    if kind == "parquet":
        other = write_format(tmp_path / "two", "parquet_bytes")
        file.write_bytes(other.read_bytes())
        assert load_records(file, cache=cache)[0]["image"] is not None
    else:  # the same size: only the time tells
        file.write_bytes(file.read_bytes().replace(b"id0", b"new"))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        assert load_records(file, cache=cache)[0]["id"] == "new"
    assert len(indexes(cache)) == 2


def test_other_versions_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, cache = write_json(tmp_path / "a.json", write_images(tmp_path)), tmp_path / "cache"
    load_records(file, cache=cache)
    monkeypatch.setattr(index_module, "FORMAT_VERSION", index_module.FORMAT_VERSION + 1)
    load_records(file, cache=cache)
    assert len(indexes(cache)) == 2


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_damaged_indexes_are_made_anew(tmp_path: Path, content: bytes | None):
    file, cache = write_json(tmp_path / "a.json", write_images(tmp_path)), tmp_path / "cache"
    load_records(file, cache=cache)
    (made,) = indexes(cache)
    made.write_bytes(made.read_bytes()[:-100] if content is None else content)
    records = load_records(file, cache=cache)
    assert [records[number]["id"] for number in range(len(records))] == [f"id{n}" for n in range(NUM_RECORDS)]


def test_many_batches_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Broken records on both sides of their bounds."""
    monkeypatch.setattr(index_module, "ROWS_PER_BATCH", 4)
    records = [make_record(3) | {"id": number} for number in range(13)]
    for number in (0, 3, 4, 12):
        records[number]["conversations"] = []
    data = load_records(write_json(tmp_path / "a.json", records), on_broken="skip", cache=tmp_path / "cache")
    assert [int(data[number]["id"]) for number in range(len(data))] == [1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert data.num_skipped == 4


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    file = write_json(tmp_path / "a.json", write_images(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"`data_cache` must be a writable folder, got .*file"):
        load_records(file, cache=tmp_path / "file" / "cache")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert index_module.default_cache() == Path.home() / ".cache" / "fusion_hf" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert index_module.default_cache() == Path("/xdg/fusion_hf/data")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert index_module.default_cache() == Path("/hf/fusion_hf/data")


def start(file: Path, cache: Path) -> BaseProcess:
    """A process that makes the index."""
    process = multiprocessing.get_context("fork").Process(target=load_records, args=(file,), kwargs={"cache": cache})
    process.start()
    return process


def test_a_killed_process_leaves_no_half_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed while it writes; the next one makes a whole index and takes the rest of the first away."""
    monkeypatch.setattr(index_module, "ROWS_PER_BATCH", ROWS)
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    write_many(file, RECORDS_TO_KILL)
    process = start(file, cache)
    while not any(rest.stat().st_size > 0 for rest in cache.glob("*.draft")):
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert list(cache.glob("*.draft")) and not indexes(cache)
    two = [start(file, cache), start(file, cache)]  # one makes it, the other waits
    for other in two:
        other.join(SECONDS)
        assert other.exitcode == 0
    assert len(indexes(cache)) == 1 and not list(cache.glob("*.draft"))
    records = load_records(file, cache=cache)
    assert len(records) == RECORDS_TO_KILL
    for number in (0, ROWS - 1, ROWS, RECORDS_TO_KILL - 1):
        assert records[number]["messages"][1]["content"] == many_record(number)["conversations"][1]["value"]


# The peak is read from /proc: `ru_maxrss` of a new process begins with what its parent holds.
MEASURE = """
import json, re, sys
from pathlib import Path
import numpy as np
from torch.utils.data import DataLoader
from fusion_hf.data import load_records

def peak_resident():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

records = load_records(sys.argv[1], cache=sys.argv[2])
indexed = peak_resident()
order = np.random.default_rng(0).permutation(len(records))[: int(sys.argv[3])]
lengths = records.lengths[order]
spots = []
for number, length, item in zip(order.tolist(), lengths.tolist(), DataLoader(records, sampler=order, batch_size=None)):
    spots.append((number, length, item["id"], item["messages"][1]["content"]))
total = int(np.abs(records.lengths.astype(np.int64)).sum())
peak = peak_resident()
json.dump({"count": len(records), "indexed": indexed, "peak": peak, "total": total, "spots": spots}, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_five_million_records_in_bounded_memory(tmp_path: Path):
    file = tmp_path / "many.jsonl"
    write_many(file, MANY)
    words = sum(len(turn["value"].split()) for number in range(5) for turn in many_record(number)["conversations"])
    for attempt in range(2):  # the second one finds the index
        arguments = [sys.executable, "-c", MEASURE, str(file), str(tmp_path / "cache"), str(SPOTS)]
        printed = subprocess.run(arguments, check=True, capture_output=True, encoding="utf-8", timeout=1800).stdout
        found = json.loads(printed)
        assert found["count"] == MANY
        assert found["total"] == MANY // 5 * words
        assert len({spot[0] for spot in found["spots"]}) == SPOTS
        for number, length, identity, answer in found["spots"]:
            record = many_record(number)
            assert identity == record["id"]
            assert answer == record["conversations"][1]["value"]
            assert -length == sum(len(turn["value"].split()) for turn in record["conversations"])
        assert found["peak"] < MAX_BYTES, f"attempt {attempt}: {found['indexed']:,} indexed, {found['peak']:,} peak"


def test_names_of_indexes_stay():
    """An index that an earlier version made is found under the same name."""
    kinds = {source.kind for source in (JsonLines, JsonArray, Table, TarRecords)}
    assert kinds == {"JsonLines", "JsonArray", "Table", "TarShard"}


def test_turns_are_counted_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An index of an earlier version, which has none, stays until then."""
    file, cache = write_format(tmp_path, "json"), tmp_path / "cache"
    with monkeypatch.context() as earlier:
        schema, batch = index_module._schema, index_module._batch

        def without_turns(rows: list[tuple], _: object) -> object:
            whole = batch(rows, schema(source))
            return whole.drop_columns(["turns"])

        source = JsonArray(file, tmp_path)
        earlier.setattr(index_module, "_batch", without_turns)
        load_records(file, cache=cache)
    (made,) = indexes(cache)
    before = made.stat().st_mtime_ns
    records = load_records(file, cache=cache)
    assert made.stat().st_mtime_ns == before
    assert records.turns.tolist() == [2] * NUM_RECORDS and records.turns.dtype == "int32"
    assert indexes(cache) == [made] and made.stat().st_mtime_ns != before
    assert load_records(file, cache=cache).turns.tolist() == [2] * NUM_RECORDS
