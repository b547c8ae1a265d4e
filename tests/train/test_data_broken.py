"""Broken records: an error that names them, or left out, counted and written down; never another in their place."""

import copy
import json
import multiprocessing
import os
import pickle
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from tests.helpers.broken_images import BROKEN as BROKEN_FILES
from tests.helpers.broken_images import ODD
from tests.helpers.image_files import png_claiming
from tests.helpers.training_data import (
    NUM_RECORDS,
    add_member,
    make_record,
    png,
    write_images,
    write_jsonl,
)
from torch.utils.data import DataLoader

from fusion_hf import FusionProcessor, nano_path
from fusion_hf.cli import main
from fusion_hf.common.errors import InputError
from fusion_hf.data import SampleKey, load_records
from fusion_hf.data.broken_records import BrokenRecords
from fusion_hf.data.record_parsing import RecordProblem
from fusion_hf.training import FusionDataCollator

BROKEN = 2  # the record that is


def talk(*turns: tuple[str, object]) -> list[dict]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


def chat(*turns: tuple[str, object]) -> dict:
    return {"conversations": None, "messages": [{"role": role, "content": content} for role, content in turns]}


IMAGE_BLOCK = {"type": "image", "image": "pictures/0.png"}
# what is changed in a record, the kind of problem, and a part of the message
STRUCTURAL = {
    "no conversation": ({"conversations": None}, "shape", "must have conversations, messages"),
    "empty": ({"conversations": []}, "empty conversation", "no answer"),
    "no answer": ({"conversations": talk(("human", "q"))}, "empty conversation", "no answer"),
    "blank answer": ({"conversations": talk(("human", "q"), ("gpt", " \n"))}, "empty conversation", "no answer"),
    "speaker": ({"conversations": talk(("human", "q"), ("bot", "a"))}, "wrong role", "must be one of human, gpt"),
    "no speaker": ({"conversations": [{"value": "q"}]}, "wrong role", "got None"),
    "list as speaker": ({"conversations": talk((["human"], "q"))}, "wrong role", "must be one of human"),
    "order": ({"conversations": talk(("gpt", "a"), ("human", "q"))}, "wrong order", "got assistant, user"),
    "answer first": (
        {"conversations": talk(("gpt", "a"), ("human", "q"), ("gpt", "a"))},
        "wrong order",
        "remove an answer without a question",
    ),
    "twice": (
        {"conversations": talk(("human", "q"), ("gpt", "a"), ("gpt", "a"))},
        "wrong order",
        "must be user, ass",
    ),
    "open end": ({"conversations": talk(("human", "q"), ("gpt", "a"), ("human", "q"))}, "wrong order", "got user"),
    "late system": ({"conversations": talk(("human", "q"), ("gpt", "a"), ("system", "s"))}, "wrong order", "system"),
    "mark": ({"image": None}, "mark without image", "<image> mark but no image"),
    "two images": ({"image": ["pictures/0.png", "pictures/1.png"]}, "several images", "at most one image, got 2"),
    "value": ({"conversations": talk(("human", 5), ("gpt", "a"))}, "shape", "value` must be a text, got int"),
    "surrogate": ({"conversations": talk(("human", "\ud800"), ("gpt", "a"))}, "unreadable", "lone surrogate"),
    "image": ({"image": 5}, "shape", "`image` must be a path or an object with bytes and path, got int"),
    "no list": ({"conversations": "q"}, "shape", "must be a list of objects, got str"),
    "role": (chat(("user", "q"), ("tool", "a")), "wrong role", "user, assistant, system, got 'tool'"),
    "block": (chat(("user", [{"type": "video"}]), ("assistant", "a")), "shape", "must be one of text, image"),
    "chat order": (chat(("assistant", "a")), "wrong order", "got assistant"),
    "block without image": (
        {**chat(("user", [{"type": "image"}]), ("assistant", "a")), "image": None},
        "mark without image",
        "image block but no image",
    ),
    "block and image": (chat(("user", [IMAGE_BLOCK]), ("assistant", "a")), "several images", "got 2"),
    "late block": (
        chat(("user", "q"), ("assistant", "a"), ("user", [IMAGE_BLOCK]), ("assistant", "a")),
        "several images",
        "only the first question",
    ),
}
IMAGES = {
    "missing": ("pictures/none.png", "missing image", "there is no 'pictures/none.png'"),
    "folder": ("pictures", "missing image", "is not a file"),
    "long name": ("x" * 5000, "missing image", "there is no"),
    "null": ("a\0b", "missing image", "there is no"),
    "loop": ("loop", "missing image", "loop"),
    "dots": ("../outside.png", "path escape", "must lie under"),
    "inner dots": ("pictures/../../outside.png", "path escape", "must lie under"),
    "absolute": ("/etc/hostname", "path escape", "must lie under"),
    "link": ("link.png", "path escape", "must lie under"),
    "link to folder": ("linked/outside.png", "path escape", "must lie under"),
    "pipe": ("pipe", "missing image", "is not a file"),
    "truncated": ("truncated.png", "broken image", "cannot be decoded"),
    "truncated jpeg": ("truncated.jpg", "broken image", "truncated"),
    "empty file": ("empty.png", "broken image", "cannot be decoded"),
    "text": ("text.png", "broken image", "cannot be decoded"),
    "postscript": ("script.eps", "broken image", "cannot be decoded"),  # would start Ghostscript
    "oversized": (
        "large.png",
        "oversized image",
        "10000 x 10000 = 100000000 pixels, more than max_image_pixels = 89478485",
    ),
    "bomb": ("bomb.png", "oversized image", "bomb"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, good and bad."""
    root = tmp_path_factory.mktemp("broken") / "data"
    write_images(root)
    (root.parent / "outside.png").write_bytes(png(0))
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "linked").symlink_to(root.parent, target_is_directory=True)
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    (root / "truncated.png").write_bytes(png(0)[:50])
    Image.effect_noise((64, 64), 50).save(root / "whole.jpg")
    content = (root / "whole.jpg").read_bytes()
    (root / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (root / "empty.png").touch()
    (root / "text.png").write_text("no picture", encoding="utf-8")
    Image.new("RGB", (4, 4)).save(root / "script.eps")
    (root / "large.png").write_bytes(png_claiming(10_000))
    (root / "bomb.png").write_bytes(png_claiming(50_000))
    return root


def records_with(**changes) -> list[dict]:
    records = [make_record(number) for number in range(NUM_RECORDS)]
    records[BROKEN] = {**records[BROKEN], **copy.deepcopy(changes)}
    return records


def write_escaped(path: Path, records: list[dict]) -> Path:
    """Half a character can only be written as an escape."""
    path.write_text("\n".join(map(json.dumps, records)), encoding="ascii")
    return path


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", STRUCTURAL)
def test_structural_problems_end_the_run(folder: Path, tmp_path: Path, case: str):
    changes, kind, detail = STRUCTURAL[case]
    file = write_escaped(tmp_path / "a.jsonl", records_with(**changes))
    with pytest.raises(InputError) as caught:
        load_records(file, root=folder, cache=tmp_path / "cache")
    for part in (str(file), f"record {BROKEN} (id 'id{BROKEN}'): {kind}: ", detail, "set `on_broken` to skip"):
        assert part in str(caught.value)


@pytest.mark.parametrize("case", STRUCTURAL)
def test_structural_problems_are_left_out(folder: Path, tmp_path: Path, case: str):
    changes, kind, _ = STRUCTURAL[case]
    file, skipped = write_escaped(tmp_path / "a.jsonl", records_with(**changes)), tmp_path / "skipped.jsonl"
    for _ in range(2):  # the second time from the index, and as a run that goes on
        records = load_records(file, root=folder, on_broken="skip", skipped_file=skipped, cache=tmp_path / "cache")
        left = [number for number in range(NUM_RECORDS) if number != BROKEN]
        assert [records[number]["id"] for number in range(len(records))] == [f"id{number}" for number in left]
        assert len(records.lengths) == len(left)
        assert records.num_skipped == 1
    (line,) = lines(skipped)
    assert (line["file"], line["index"], line["id"]) == (str(file), BROKEN, f"id{BROKEN}")
    assert line["reason"].startswith(f"{kind}: ")


@pytest.mark.parametrize("case", IMAGES)
def test_broken_images(folder: Path, tmp_path: Path, case: str):
    name, kind, detail = IMAGES[case]
    file, skipped = write_jsonl(tmp_path / "a.jsonl", records_with(image=name)), tmp_path / "skipped.jsonl"
    records = load_records(file, root=folder, cache=tmp_path / "cache")
    assert len(records) == NUM_RECORDS
    with pytest.raises(InputError) as caught:
        records[BROKEN]
    for part in (str(file), f"record {BROKEN} (id 'id{BROKEN}'): {kind}: ", detail):
        assert part in str(caught.value)

    records = load_records(file, root=folder, on_broken="skip", skipped_file=skipped, cache=tmp_path / "cache")
    assert not skipped.exists()
    for _ in range(2):  # counted once
        item = records[SampleKey(BROKEN, 9)]
        assert set(item) == {"id", "skipped", "query_len"}
        assert item["id"] == f"id{BROKEN}" and item["skipped"].startswith(f"{kind}: ") and item["query_len"] == 9
    assert records.num_skipped == len(lines(skipped)) == 1
    assert records[BROKEN + 1]["id"] == f"id{BROKEN + 1}"


def test_paths_that_stay_inside(folder: Path, tmp_path: Path):
    inside = {0: str(folder / "pictures" / "0.png"), 1: "pictures/../pictures/1.png"}
    records = [{**make_record(number), "image": name} for number, name in inside.items()]
    data = load_records(write_jsonl(tmp_path / "a.jsonl", records), root=folder, cache=tmp_path / "cache")
    assert [data[number]["image"].size for number in inside] == [(16, 12), (17, 12)]


def test_a_smaller_limit_of_pixels(folder: Path, tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [make_record(0), make_record(1)])
    records = load_records(file, root=folder, cache=tmp_path / "cache", max_image_pixels=16 * 12)
    assert records[0]["image"].size == (16, 12)
    with pytest.raises(InputError, match="17 x 12 = 204 pixels, more than max_image_pixels = 192"):
        records[1]


@pytest.mark.parametrize("line", [b"{", b"5", b'"text"', b"null", b"[1]", b'{"id": "\xff"}', b"[" * 100_000])
def test_unreadable_lines(tmp_path: Path, line: bytes):
    file = tmp_path / "a.jsonl"
    good = json.dumps(make_record(3)).encode()
    file.write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(
        InputError, match=r"a.jsonl, record 1: (unreadable|shape): (not valid|the record must be a JSON object)"
    ):
        load_records(file, cache=tmp_path / "cache")
    records = load_records(file, cache=tmp_path / "cache", on_broken="skip")
    assert len(records) == 2 and records.num_skipped == 1


def test_elements_of_an_array_that_are_no_objects(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([5, make_record(3), "text", None, 1.5]), encoding="utf-8")
    with pytest.raises(InputError, match=r"a.json, record 0: shape: .*must be a JSON object, got int"):
        load_records(file, cache=tmp_path / "cache")
    records = load_records(file, cache=tmp_path / "cache", on_broken="skip")
    assert len(records) == 1 and records.num_skipped == 4 and records[0]["id"] == "id3"


def test_broken_records_of_a_tar(tmp_path: Path):
    record = json.dumps(make_record(0)).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "a.json", record)  # names an image, which is not beside it
        add_member(tar, "b.png", png(0))
        add_member(tar, "c.json", record)
        add_member(tar, "c.png", png(0))
        add_member(tar, "c.jpg", png(0))
        add_member(tar, "d.json", b"{")
        add_member(tar, "e.json", record)
        add_member(tar, "e.png", png(0)[:40])
        add_member(tar, "notes.txt", b"no record")
        add_member(tar, "../f.json", record)  # only a name: nothing is unpacked
        add_member(tar, "../f.png", png(0))
    records = load_records(tmp_path / "a.tar", on_broken="skip", cache=tmp_path / "cache", skipped_file=tmp_path / "s")
    assert [line["reason"].split(":")[0] for line in lines(tmp_path / "s")] == [
        "missing image", "shape", "several images", "unreadable",
    ]  # fmt: skip
    assert len(records) == 2
    assert records[0]["skipped"].startswith("broken image")
    assert records[1]["image"].size == (16, 12)


def test_strategies_count_broken_records(folder: Path, tmp_path: Path):
    """No other record takes the place of one that is left out."""
    write_jsonl(folder / "strategy.jsonl", records_with(conversations=[]))
    taken = {"first:3": [0, 1], "end:5": [3, 4, 5, 6], "end:2": [5, 6], "random:7": [0, 1, 3, 4, 5, 6]}
    for strategy, expected in taken.items():
        mixture = tmp_path / "m.yaml"
        entry = f"{{json_path: strategy.jsonl, sampling_strategy: '{strategy}'}}"
        mixture.write_text(f"datasets: [{entry}]", encoding="utf-8")
        records = load_records(mixture, root=folder, on_broken="skip", cache=tmp_path / "cache")
        assert [records[number]["id"] for number in range(len(records))] == [f"id{number}" for number in expected]
    mixture.write_text("datasets: [{json_path: strategy.jsonl, sampling_strategy: 'end:2'}]", encoding="utf-8")
    assert len(load_records(mixture, root=folder, cache=tmp_path / "cache")) == 2  # the broken one is not taken


def test_the_limit_of_structural_problems(folder: Path, tmp_path: Path):
    broken = [{**make_record(number), "conversations": []} for number in range(5)]
    file, skipped = write_jsonl(tmp_path / "a.jsonl", [*broken, make_record(5)]), tmp_path / "skipped.jsonl"
    arguments = {"root": folder, "on_broken": "skip", "cache": tmp_path / "cache", "skipped_file": skipped}
    with pytest.raises(InputError, match=r"max_skipped` = 4 records are broken, see .*skipped.jsonl"):
        load_records(file, max_skipped=4, **arguments)
    skipped.unlink()
    assert len(load_records(file, max_skipped=5, **arguments)) == 1


def test_nothing_is_left(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": 1}])
    with pytest.raises(InputError, match="all records are broken"):
        load_records(file, on_broken="skip", cache=tmp_path / "cache")


@pytest.mark.parametrize("given", [True, False])
def test_the_limit_holds_over_workers(folder: Path, tmp_path: Path, given: bool):
    """Also where no file for them is given, and each broken record is read twice."""
    records = [{**make_record(number), "id": number, "image": "none.png"} for number in range(6) if number != 3]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    for limit in (5, 4):
        data = load_records(
            file,
            root=folder,
            on_broken="skip",
            max_skipped=limit,
            cache=tmp_path / "cache",
            skipped_file=tmp_path / f"skipped{limit}.jsonl" if given else None,
        )
        loader = DataLoader(data, sampler=[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], num_workers=2, batch_size=1, collate_fn=list)
        if limit == 4:
            with pytest.raises(InputError, match="max_skipped` = 4 records"):
                list(loader)
        else:
            assert all("skipped" in batch[0] for batch in loader)
            assert data.num_skipped == 5


def write_skips(broken: BrokenRecords, begin: int) -> None:
    for index in range(begin, begin + 40):
        broken.handle([("file", index, RecordProblem("shape", "x", "id"))])


@pytest.mark.slow
def test_many_processes_write_whole_lines(tmp_path: Path):
    broken = BrokenRecords("skip", 1000, tmp_path / "skipped.jsonl")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_skips, args=(broken, begin)) for begin in (0, 20, 40)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(line["index"] for line in lines(broken.file)) == list(range(80))
    assert len(broken) == len(pickle.loads(pickle.dumps(broken))) == 80  # noqa: S301 (our own)


def test_half_a_line_of_a_killed_process(tmp_path: Path):
    file = tmp_path / "skipped.jsonl"
    file.write_text('{"file": "file", "index": 0, "id": null, "reason": "x"}\n{"file": "fi', encoding="utf-8")
    broken = BrokenRecords("skip", 2, file)
    broken.handle([("file", 1, RecordProblem("shape", "x")), ("file", 0, RecordProblem("shape", "x"))])
    assert len(broken) == 2
    assert json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["index"] == 1


def test_a_temporary_file_goes_away_with_its_owner():
    broken = BrokenRecords("skip", 2)
    broken.handle([("file", 1, RecordProblem("shape", "x"))])
    file = broken.file
    assert file.exists()
    del broken
    assert not file.exists() and not file.with_name(f"{file.name}.lock").exists()


def test_policies_that_are_none(tmp_path: Path):
    with pytest.raises(InputError, match="`on_broken` must be one of error, skip, got 'ignore'"):
        BrokenRecords("ignore")
    with pytest.raises(InputError, match=r"`max_skipped` must be .* 0, got -1"):
        BrokenRecords("skip", -1)
    (tmp_path / "file").touch()
    broken = BrokenRecords("skip", 1, tmp_path / "file" / "skipped.jsonl")
    with pytest.raises(InputError, match=r"skipped_file` .* cannot be written"):
        broken.handle([("file", 1, RecordProblem("shape", "x"))])


@pytest.mark.filterwarnings("ignore")
def test_images_from_strangers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What opening lets pass, the collator takes; the check of the data finds the same as the training."""
    files = {f"{number}.png": content for number, content in enumerate(BROKEN_FILES.values())} | ODD
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    records = [{**make_record(0), "id": name, "image": name} for name in files]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    settings = {"on_broken": "skip", "cache": tmp_path / "cache"}
    collator = FusionDataCollator(FusionProcessor.from_pretrained(nano_path()), compact=True)
    data = load_records(file, **settings)
    items = [data[index] for index in range(len(data))]
    assert ["skipped" in item for item in items] == [name not in ODD for name in files]
    batch = collator(items)
    assert len(batch["pixel_bytes"]) == len(ODD)
    unturned = load_records(file, **settings, exif_transpose=False)
    first = len(BROKEN_FILES)
    assert unturned[first]["image"].size == items[first]["image"].size[::-1]

    assert main(["data", "check", str(file), "--images", "decode", "--data-cache", str(tmp_path / "cache")]) == 1
    counts = re.findall(r"(?:broken|oversized) image: (\d+), first", capsys.readouterr().out)
    assert sum(map(int, counts)) == len(BROKEN_FILES)
