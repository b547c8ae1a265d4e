"""Records as other data sets have them: read the same, or refused with the rename that would make them readable."""

import base64
import json
import re
import struct
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from tests.helpers.serving import ImageHost
from tests.helpers.training_data import add_member, color, make_image, png, write_json, write_jsonl

from fusion_hf.common.errors import InputError
from fusion_hf.common.image_fetching import MAX_REDIRECTS, SECONDS
from fusion_hf.data import index as index_module
from fusion_hf.data import load_records
from fusion_hf.data.check import SAMPLE
from fusion_hf.data.image_files import MAX_FETCHED_BYTES
from fusion_hf.data.record_parsing import RecordProblem, parse_record
from fusion_hf.data.tar_shards import CAPTION_QUESTION, MAX_HEADER_BYTES
from fusion_hf.serving.limits import Limits
from fusion_hf.training.collator import record_to_messages

TURNS = (("user", "What is it?"), ("assistant", "A cup."), ("user", "Sure?"), ("assistant", "Yes."))
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
URI = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
HERE = "127.0.0.1"


def chat(block: Any) -> list[dict[str, Any]]:
    """The messages with a block before the first question's text."""
    first = {"role": "user", "content": [block, {"type": "text", "text": TURNS[0][1]}]}
    return [first, *MESSAGES[1:]]


LAYOUTS: dict[str, dict[str, Any]] = {
    "finevision": {
        "images": ["1.png"],
        "texts": [
            {"user": "What is it?", "assistant": "A cup."},
            {"user": "Sure?", "assistant": "Yes.", "source": "x"},
        ],
        "source": "x",
    },
    "user and assistant": {
        "image": "1.png",
        "conversations": [{"from": role, "value": text} for role, text in TURNS],
    },
    "image_url": {"messages": chat({"type": "image_url", "image_url": {"url": "1.png", "detail": "low"}})},
    "image_url as a text": {"messages": chat({"type": "image_url", "image_url": "1.png"})},
    "data URI": {"messages": chat({"type": "image_url", "image_url": {"url": URI}})},
    "trl": {"images": ["1.png"], "messages": MESSAGES},
    "trl with a block": {"images": ["1.png"], "messages": chat({"type": "image"})},
    "trl prompt and completion": {"images": ["1.png"], "prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
}


def image(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1.png").write_bytes(png(1))
    return folder


def check(item: dict[str, Any], messages: list[dict[str, Any]] = MESSAGES) -> None:
    assert [{**message, "content": message["content"].strip()} for message in item["messages"]] == messages
    assert item["image"].size == make_image(1).size and item["image"].getpixel((3, 3)) == color(1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_alike(tmp_path: Path, layout: str, streaming: bool):
    file = write_jsonl(image(tmp_path) / "a.jsonl", [LAYOUTS[layout]])
    records = load_records(file, cache=tmp_path / "cache", streaming=streaming)
    check(next(iter(records)) if streaming else records[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trainer_s_own_records_are_read_alike(layout: str):
    """Those of a list or of a `datasets.Dataset`, which `load_records` does not see."""
    messages = record_to_messages(LAYOUTS[layout])
    (block, *texts), *others = (message["content"] for message in messages)
    assert block == {"type": "image", "image": URI if layout == "data URI" else "1.png"}
    assert [texts[-1]["text"], *others] == [text for _, text in TURNS]


def test_texts_as_prompt_and_completion(tmp_path: Path):
    record = {"image": "1.png", "prompt": "What is it?", "completion": "A cup."}
    file = write_json(image(tmp_path) / "a.json", [record])
    check(load_records(file, cache=tmp_path / "cache")[0], MESSAGES[:2])


ASKED = {"image": "1.png", "conversations": LAYOUTS["user and assistant"]["conversations"]}
UNREAD = {
    "other name of turns": ({"dialog": ASKED["conversations"]}, "rename 'dialog' to 'conversations'"),
    "other name of messages": ({"chat": MESSAGES}, "rename 'chat' to 'messages'"),
    "other name of pairs": ({"qa": LAYOUTS["finevision"]["texts"]}, "rename 'qa' to 'texts'"),
    "messages as conversations": ({"conversations": MESSAGES}, "rename 'conversations' to 'messages'"),
    "turns as messages": ({"messages": ASKED["conversations"]}, "rename 'messages' to 'conversations'"),
    "question and answer": (
        {"question": "What?", "answer": "A cup."},
        "rename 'question' to 'prompt', rename 'answer' to 'completion'",
    ),
    "caption": ({"image": "1.png", "caption": "A cup."}, "rename 'caption' to 'completion'"),
    "nothing": ({"id": "1", "width": 5}, "got id, width"),
    "image_path": ({**ASKED, "image": None, "image_path": "1.png"}, "rename 'image_path' to 'image'"),
    "file_name": ({**ASKED, "image": None, "file_name": "1.JPG"}, "rename 'file_name' to 'image'"),
    "block": ({"messages": chat({"type": "image"}), "img": {"bytes": "x"}}, "rename 'img' to 'image'"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_an_unread_layout_names_the_rename(tmp_path: Path, case: str):
    record, message = UNREAD[case]
    file = write_json(image(tmp_path) / "a.json", [record])
    with pytest.raises(InputError, match="record 0") as raised:
        load_records(file, cache=tmp_path / "cache")
    assert message in str(raised.value)


def test_renamed_as_told_it_is_read(tmp_path: Path):
    """What the errors of `UNREAD` advise."""
    for case in ("other name of turns", "other name of messages", "other name of pairs", "question and answer"):
        record, message = UNREAD[case]
        renames = [part.split("'")[1::2] for part in message.split(", ")]
        renamed = {new: record[old] for old, new in renames}
        assert parse_record(renamed, 0).messages[1]["content"] == "A cup."


@pytest.mark.parametrize("texts", [[], "x", ["x"], [{"user": 5, "assistant": "x"}], [{"user": "x"}], {"user": "x"}])
def test_texts_that_are_none(texts: Any):
    with pytest.raises(RecordProblem):
        parse_record({"texts": texts}, 0)


def test_a_metadata_field_is_no_image():
    """Only what looks like an image's file does."""
    record = {"conversations": ASKED["conversations"], "url": "https://example.com/page", "file": "list.txt"}
    assert parse_record(record, 0).image is None


@pytest.mark.parametrize("count", [2, 3])
def test_several_images_are_refused(count: int):
    with pytest.raises(RecordProblem, match=f"several images: .*at most one image, got {count}"):
        parse_record({**LAYOUTS["finevision"], "images": ["1.png"] * count}, 0)


# tables


def rows(images: bool) -> list[dict[str, Any]]:
    pairs = [{"user": user, "assistant": answer} for user, answer in (("What is it?", "A cup."), ("Sure?", "Yes."))]
    return [{"images": [make_image(1)] if images else ["1.png"], "texts": pairs, "source": "x"} for _ in range(3)]


def finevision() -> datasets.Dataset:
    return datasets.Dataset.from_list(rows(images=True))


def save_splits(folder: Path, *names: str) -> Path:
    datasets.DatasetDict({name: finevision() for name in names}).save_to_disk(str(folder))
    return folder


def write_parquet(folder: Path) -> Path:
    finevision().to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


TABLES: dict[str, Callable[[Path], Path]] = {
    "parquet": write_parquet,
    "saved": lambda folder: finevision().save_to_disk(str(folder / "saved")) or folder / "saved",
    "saved split": lambda folder: save_splits(folder / "saved", "test", "train"),
    "only split": lambda folder: save_splits(folder / "saved", "test"),
    "named split": lambda folder: save_splits(folder / "saved", "a", "b") / "b",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_images_and_texts(tmp_path: Path, kind: str, streaming: bool):
    records = load_records(TABLES[kind](tmp_path), cache=tmp_path / "cache", streaming=streaming)
    items = list(records.split(epochs=1)) if streaming else [records[number] for number in range(len(records))]
    assert len(items) == 3
    for item in items:
        check(item)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_of_lists_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
    file, load = write_parquet(tmp_path), datasets.load_dataset

    def load_dataset(repository: str, split: str, streaming: bool) -> Any:
        return load("parquet", data_files=str(file), split="train", streaming=streaming, cache_dir=tmp_path / "hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    records = load_records("owner/name", cache=tmp_path / "cache", streaming=streaming)
    check(next(iter(records)) if streaming else records[0])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "a", "answer": "b"}, "rename 'question' to 'prompt', rename 'answer' to 'completion'"),
        ({"conversation": "[]"}, "rename 'conversation' to 'conversations'"),
        ({"conversations": "[]", "img": "1.png"}, "a column 'img'. Rename it to 'image'"),
        ({"width": "5"}, "does it hold records?"),
    ],
)
def test_unread_columns_name_the_rename(tmp_path: Path, columns: dict[str, str], message: str):
    file = tmp_path / "a.csv"
    file.write_text(f"{','.join(columns)}\n{','.join(columns.values())}\n", encoding="utf-8")
    with pytest.raises(InputError) as raised:
        load_records(file, cache=tmp_path / "cache")
    assert message in str(raised.value)


def test_saved_splits_without_a_choice(tmp_path: Path):
    with pytest.raises(InputError, match=r"with the splits a, b\. Give the folder of one"):
        load_records(save_splits(tmp_path / "saved", "a", "b"))


def damage(folder: Path, name: str, content: bytes) -> Path:
    finevision().save_to_disk(str(folder))
    (folder / name).write_bytes(content)
    return folder


def state(**changes: Any) -> bytes:
    return json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], **changes}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", state(_data_files=[{"filename": "../other.arrow"}]), "must name files in its own folder only"),
        ("state.json", state(_data_files=[{"filename": "/etc/hostname"}]), "must name files in its own folder only"),
        ("state.json", b"{", "cannot be read as a saved data set"),
        ("state.json", b"[" * 100_000, "cannot be read as a saved data set"),
        ("state.json", b"[]", "cannot be read as a saved data set"),
        ("state.json", b" " * (2**24 + 1), "must have at most 16777216 bytes"),
        ("dataset_info.json", b"nothing", "cannot be read as a saved data set"),
        ("data-00000-of-00001.arrow", b"nothing", "cannot be read as a saved data set"),
    ],
)
def test_saved_data_sets_that_are_none(tmp_path: Path, name: str, content: bytes, message: str):
    with pytest.raises(InputError, match=message):
        load_records(damage(tmp_path / "saved", name, content), cache=tmp_path / "cache")


def test_offsets_that_lead_out_of_a_saved_file(tmp_path: Path):
    """Read unchecked, they could end the process."""
    folder = tmp_path / "saved"
    identities = ["x" * 1001, "y" * 1002]
    datasets.Dataset.from_list([{"messages": "[]", "id": name} for name in identities]).save_to_disk(str(folder))
    (file,) = folder.glob("*.arrow")
    offsets, wild = struct.pack("<iii", 0, 1001, 2003), struct.pack("<iii", 0, 1001, 2**30)
    content = file.read_bytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, wild))
    with pytest.raises(InputError, match="cannot be read as a saved data set"):
        load_records(folder, cache=tmp_path / "cache")


# tar shards


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add_member(tar, name, content)
    return path


CAPTION = [{"role": "user", "content": CAPTION_QUESTION}, {"role": "assistant", "content": "A cup."}]
METADATA = json.dumps({"key": "1", "url": "https://example.com", "caption": "A cup."}).encode()
RECORD = json.dumps({"texts": LAYOUTS["finevision"]["texts"]}).encode()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("members", "messages"),
    [
        ({"1.jpg": png(1), "1.txt": b"A cup.\n"}, CAPTION),
        ({"1.jpg": png(1), "1.json": METADATA, "1.txt": b"A cup."}, CAPTION),
        ({"1.jpg": png(1), "1.json": RECORD, "1.txt": b"Another."}, MESSAGES),
        ({"1.json": RECORD, "1.png": png(1)}, MESSAGES),
    ],
)
def test_shards_of_captions(tmp_path: Path, members: dict[str, bytes], messages: list[dict], streaming: bool):
    file = write_shard(tmp_path / "a.tar", {f"00{name}": content for name, content in members.items()})
    records = load_records(file, cache=tmp_path / "cache", streaming=streaming)
    check(next(iter(records)) if streaming else records[0], messages)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": png(1)}, "must have one .json or .txt file, got 0"),
        ({"1.jpg": png(1), "1.json": METADATA}, "rename 'caption' to 'completion'"),
        ({"1.jpg": png(1), "1.txt": b"\xff"}, "unreadable: not valid UTF-8"),
        ({"1.jpg": png(1), "1.txt": b" "}, "empty conversation"),
        ({"1.jpg": png(1), "1.json": b"{", "1.txt": b"A cup."}, "unreadable: not valid JSON"),
    ],
)
def test_members_that_are_no_record(tmp_path: Path, members: dict[str, bytes], message: str):
    with pytest.raises(InputError, match=message):
        load_records(write_shard(tmp_path / "a.tar", members), cache=tmp_path / "cache")


def test_members_never_leave_the_tar(tmp_path: Path):
    """Names lead nowhere, links are not followed, and nothing is unpacked."""
    (tmp_path / "secret.json").write_bytes(RECORD)
    file = tmp_path / "data" / "a.tar"
    file.parent.mkdir()
    with tarfile.open(file, "w") as tar:
        add_member(tar, "../../out.txt", b"A cup.")
        add_member(tar, "../../out.png", png(1))
        for name, kind in (("link.json", tarfile.SYMTYPE), ("hard.json", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.json")
            tar.addfile(info)
            add_member(tar, name.replace(".json", ".png"), png(1))
    records = load_records(file, cache=tmp_path / "cache", on_broken="skip")
    assert len(records) == 1 and records.num_skipped == 2
    check(records[0], CAPTION)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "secret.json"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_headers_that_would_not_fit_into_memory(tmp_path: Path, kind: bytes):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 2**32
    with (tmp_path / "a.tar").open("wb") as stream:
        stream.write(info.tobuf(tarfile.USTAR_FORMAT))
        stream.truncate(2**33)  # sparse: takes no room on the disk
    with pytest.raises(InputError, match=f"header must have at most {MAX_HEADER_BYTES} bytes, got {2**32}"):
        load_records(tmp_path / "a.tar", cache=tmp_path / "cache")


def test_headers_of_headers_without_end(tmp_path: Path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    (tmp_path / "a.tar").write_bytes((info.tobuf() + b"x".ljust(512, b"\0")) * 3000)
    with pytest.raises(InputError, match="not a complete, uncompressed tar"):
        load_records(tmp_path / "a.tar", cache=tmp_path / "cache")


def test_images_in_a_tar_are_bounded(tmp_path: Path):
    stream = BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    file = write_shard(tmp_path / "a.tar", {"1.png": stream.getvalue(), "1.txt": b"A bomb."})
    records = load_records(file, cache=tmp_path / "cache")
    with pytest.raises(InputError, match="oversized image"):
        records[0]


# places of images


def asked(image: str) -> list[dict[str, Any]]:
    return [{**ASKED, "image": image}]


def test_absolute_paths_under_a_named_root(tmp_path: Path):
    elsewhere = image(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    file = write_json(tmp_path / "data" / "a.json", asked(str(elsewhere / "1.png")))
    with pytest.raises(InputError, match=r"path escape: .*under a folder of `image_roots`"):
        load_records(file, cache=tmp_path / "cache")[0]
    check(load_records(file, cache=tmp_path / "cache", image_roots=[elsewhere])[0])
    with pytest.raises(InputError, match="path escape"):
        load_records(file, cache=tmp_path / "cache", image_roots=[tmp_path / "data"])[0]
    with pytest.raises(InputError, match=r"`image_roots` must contain folders, got .*none"):
        load_records(file, cache=tmp_path / "cache", image_roots=[tmp_path / "none"])


def test_linked_folders_under_a_named_root(tmp_path: Path):
    elsewhere = image(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(elsewhere, target_is_directory=True)
    file = write_json(tmp_path / "data" / "a.json", asked("images/1.png"))
    with pytest.raises(InputError, match="path escape"):
        load_records(file, cache=tmp_path / "cache")[0]
    for root in (elsewhere, tmp_path / "data" / "images"):
        check(load_records(file, cache=tmp_path / "cache", image_roots=[root])[0])
    (elsewhere / "out.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "outside.png").write_bytes(png(1))
    file = write_json(tmp_path / "data" / "b.json", asked("images/out.png"))
    with pytest.raises(InputError, match="path escape"):
        load_records(file, cache=tmp_path / "cache", image_roots=[elsewhere])[0]


@pytest.fixture
def hosted() -> Any:
    with ImageHost() as host:
        yield host


def test_addresses_of_named_hosts(tmp_path: Path, hosted: ImageHost):
    file = write_json(tmp_path / "a.json", asked(f"{hosted.url}/red.png"))
    name = f"{HERE}:{hosted.port}"
    with pytest.raises(InputError, match=r"remote image: .*must be listed in `image_hosts`"):
        load_records(file, cache=tmp_path / "cache")[0]
    with pytest.raises(InputError, match="an address that is not public"):
        load_records(file, cache=tmp_path / "cache", image_hosts=[name])[0]
    assert hosted.requested == []
    item = load_records(file, cache=tmp_path / "cache", private_image_hosts=[name])[0]
    assert item["image"].mode == "RGB" and hosted.requested == ["/red.png"]
    with pytest.raises(InputError, match=r"An image host must be .*got 'a/b'"):
        load_records(file, image_hosts=["a/b"])


def test_fetching_is_bounded_as_the_server_s():
    assert Limits().image_bytes == MAX_FETCHED_BYTES and SECONDS == 15


@pytest.mark.parametrize("uri", ["data:image/png,x", "data:image/png;base64,!", "data:image/png;base64,AAAA", "data:"])
def test_data_uris_that_are_no_image(tmp_path: Path, uri: str):
    records = load_records(write_json(tmp_path / "a.json", asked(uri)), cache=tmp_path / "cache")
    with pytest.raises(InputError, match="broken image"):
        records[0]


# indexes of earlier versions


def test_what_an_earlier_version_could_not_read_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, cache = write_json(image(tmp_path) / "a.json", [LAYOUTS["finevision"], ASKED]), tmp_path / "cache"
    with monkeypatch.context() as earlier:
        earlier.setattr(index_module, "READING_VERSION", b"1")

        def parse_as_before(raw: Any, number: int, image_key: str) -> Any:
            if "texts" in raw:
                raise RecordProblem("shape", "it has neither conversations nor messages")
            return parse_record(raw, number, image_key)

        earlier.setattr(index_module, "parse_record", parse_as_before)
        assert len(load_records(file, cache=cache, on_broken="skip")) == 1
    (made,) = cache.glob("*.arrow")
    records = load_records(file, cache=cache)
    assert len(records) == 2 and list(cache.glob("*.arrow")) == [made]
    check(records[0])


def test_a_whole_index_of_an_earlier_version_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, cache = write_json(image(tmp_path) / "a.json", [ASKED]), tmp_path / "cache"
    with monkeypatch.context() as earlier:
        earlier.setattr(index_module, "READING_VERSION", b"1")
        load_records(file, cache=cache)
    (made,) = cache.glob("*.arrow")
    before = made.stat().st_mtime_ns
    check(load_records(file, cache=cache)[0])
    assert made.stat().st_mtime_ns == before


# the document


def test_the_documented_layouts_are_read(tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs" / "training_data.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (image(tmp_path / "images") / "1.png").rename(tmp_path / "images" / "1.jpg")
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    records = load_records(tmp_path / "a.jsonl", cache=tmp_path / "cache")
    assert len(records) == 7
    for number in range(len(records)):
        check(records[number], MESSAGES[:2])


def test_the_documented_limits():
    text = (Path(__file__).parents[2] / "docs" / "training_data.md").read_text(encoding="utf-8")
    limits = f"at most {MAX_REDIRECTS} redirects, {MAX_FETCHED_BYTES // 2**20} MiB and {SECONDS:g} seconds"
    assert limits in " ".join(text.split())
    assert f"decodes {SAMPLE} of each file" in " ".join(text.split()) and f'it answers "{CAPTION_QUESTION}"' in text
