"""The same few records in every format that training reads."""

import csv
import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

Fields = dict[str, Any]
NUM_RECORDS = 7  # record 3 has no image
TEXT_ONLY = 3
FORMATS = ("json", "json_messages", "jsonl", "parquet", "parquet_bytes", "csv", "folder", "folder_csv", "tar", "tars")


def color(number: int) -> tuple[int, int, int]:
    return (number * 30, 255 - number * 30, 128)


def make_image(number: int) -> Image.Image:
    return Image.new("RGB", (16 + number, 12), color(number))


def png(number: int) -> bytes:
    stream = BytesIO()
    make_image(number).save(stream, "PNG")
    return stream.getvalue()


def make_record(number: int) -> Fields:
    """LLaVA-shaped, with a letter of several bytes and two turns."""
    mark = "" if number == TEXT_ONLY else "<image>\n"
    turns = [("human", f"{mark}Wie groß ist {number}?"), ("gpt", f"It is {number} « big »."), ("human", "Sure?")]
    record: Fields = {"id": f"id{number}", "image": f"pictures/{number}.png"}
    if number == TEXT_ONLY:
        del record["image"]
    values = [{"from": speaker, "value": text} for speaker, text in (*turns, ("gpt", "Yes"))]
    return {**record, "conversations": values}


def to_messages(record: Fields) -> Fields:
    """The same with chat messages; the image is a block of the first question."""
    roles = {"human": "user", "gpt": "assistant"}
    messages: list[Fields] = []
    for turn in record["conversations"]:
        marked = "<image>" in turn["value"]
        content: Any = turn["value"].replace("<image>", "")
        if marked:
            content = [{"type": "image", "path": record["image"]}, {"type": "text", "text": content}]
        messages.append({"role": roles[turn["from"]], "content": content})
    return {"id": record["id"], "messages": messages}


def write_json(path: Path, records: list[Fields]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_jsonl(path: Path, records: list[Fields]) -> Path:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def write_tar(path: Path, numbers: range) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            record = make_record(number)
            if "image" in record:
                add_member(tar, f"train/{number:05d}.png", png(number))
            add_member(tar, f"train/{number:05d}.json", json.dumps(record).encode())
    return path


def write_images(root: Path) -> list[Fields]:
    """Images under `root`, and the records that go with them."""
    (root / "pictures").mkdir(parents=True)
    for number in range(NUM_RECORDS):
        (root / "pictures" / f"{number}.png").write_bytes(png(number))
    return [make_record(number) for number in range(NUM_RECORDS)]


def write_format(root: Path, kind: str) -> Path:
    """The records in one of FORMATS, with their images, under `root`."""
    records = write_images(root)
    if kind == "json":
        return write_json(root / "data.json", records)
    if kind == "json_messages":
        return write_json(root / "data.json", [to_messages(record) for record in records])
    if kind == "jsonl":
        return write_jsonl(root / "data.jsonl", records)
    if kind in ("parquet", "parquet_bytes"):
        return _write_parquet(root / "data.parquet", records, embedded=kind == "parquet_bytes")
    if kind == "csv":
        return _write_csv(root / "data.csv", records, "image")
    if kind in ("folder", "folder_csv"):
        return _write_folder(root, records, kind)
    if kind == "tar":
        return write_tar(root / "data.tar", range(NUM_RECORDS))
    (root / "shards").mkdir()
    write_tar(root / "shards" / "000.tar", range(4))
    write_tar(root / "shards" / "001.tar", range(4, NUM_RECORDS))
    return root / "shards"


def _write_parquet(path: Path, records: list[Fields], embedded: bool) -> Path:
    rows = [{"image": None, **record} for record in records]
    if embedded:
        images = [None if row["image"] is None else png(number) for number, row in enumerate(rows)]
        rows = [
            {**row, "image": None if image is None else {"bytes": image, "path": None}}
            for row, image in zip(rows, images, strict=True)
        ]
    dataset = datasets.Dataset.from_list(rows)
    if embedded:
        dataset = dataset.cast_column("image", datasets.Image())
    dataset.to_parquet(str(path))
    return path


def _write_csv(path: Path, records: list[Fields], key: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ("id", key, "conversations"))
        writer.writeheader()
        for record in records:
            turns = json.dumps(record["conversations"], ensure_ascii=False)
            writer.writerow({"id": record["id"], key: record.get(key, ""), "conversations": turns})
    return path


def _write_folder(root: Path, records: list[Fields], kind: str) -> Path:
    folder = root / "pictures"
    named = [
        {**record, "file_name": Path(record.pop("image")).name} if "image" in record else record for record in records
    ]
    if kind == "folder":
        write_jsonl(folder / "metadata.jsonl", named)
    else:
        _write_csv(folder / "metadata.csv", named, "file_name")
    return folder
