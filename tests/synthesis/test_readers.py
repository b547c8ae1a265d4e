"""Caption pools of all kinds, and what strangers put into them."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from fusion_hf.common.errors import InputError
from fusion_hf.data import table_sources
from fusion_hf.synthesis import readers
from fusion_hf.synthesis.readers import read_captions
from fusion_hf.synthesis.run_config import CaptionPool

CAPTIONS = ["A red ball.", "Ein großer Hund", "two cats « here »"]


def texts(pool: CaptionPool) -> list[str]:
    return [caption.text for caption in read_captions(pool) if caption.problem is None]


def problems(pool: CaptionPool) -> list[str | None]:
    return [caption.problem for caption in read_captions(pool)]


def write_pool(folder: Path, kind: str) -> CaptionPool:
    path = folder / f"pool.{'txt' if kind == 'text' else kind}"
    if kind == "text":
        path.write_text("\n".join(CAPTIONS), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text(
            "\r\n".join(json.dumps({"caption": text, "more": 1}) for text in CAPTIONS), encoding="utf-8-sig"
        )
    else:
        table = pa.table({"more": [1, 2, 3], "caption": CAPTIONS})
        pyarrow.parquet.write_table(table, path)
    return CaptionPool(str(path), kind)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_files_and_folders(kind: str, tmp_path: Path):
    pool = write_pool(tmp_path, kind)
    assert texts(pool) == CAPTIONS
    assert texts(CaptionPool(str(tmp_path), kind)) == CAPTIONS
    assert texts(CaptionPool(pool.source, kind, limit=2)) == CAPTIONS[:2]


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch):
    rows = datasets.Dataset.from_dict({"caption": CAPTIONS, "image": ["x"] * 3}).to_iterable_dataset()
    asked = []
    monkeypatch.setattr(table_sources, "load_hub", lambda *given, streaming: asked.append((*given, streaming)) or rows)
    assert texts(CaptionPool("owner/captions", "hub", split="validation")) == CAPTIONS
    assert asked == [("owner/captions", "validation", True)]
    with pytest.raises(InputError, match=r"`pool.column` must be one of caption, image of owner/captions, got 'text'"):
        texts(CaptionPool("owner/captions", "hub", column="text"))


def test_bad_lines_are_reported_in_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    lines = [
        b'{"caption": "good"}',
        b'{"caption": ',
        b'{"caption": "' + b"x" * 500 + b'"}',
        b'{"caption": 3}',
        b"[1]",
        b'{"caption": "\xff"}',
        b'{"caption": " \\n\\t "}',
        b'{"caption": "last\\u0007\\nline"}',
    ]
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = list(read_captions(CaptionPool(str(path), "jsonl")))
    assert [caption.text for caption in found if caption.problem is None] == ["good", "last line"]
    expected = [
        None,
        "is no JSON",
        "more than 100 bytes",
        "is int, no text",
        "no text",
        "is no JSON",
        "is empty",
        None,
    ]
    for caption, part in zip(found, expected, strict=True):
        assert caption.problem == part or part in caption.problem


def test_a_long_caption_and_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "pool.txt"
    path.write_bytes(b"x" * 5000 + b"\n\xff\xfe\nfine")
    assert problems(CaptionPool(str(path), "text")) == [
        "the caption has more than 4000 characters",
        "a line is no UTF-8",
        None,
    ]


def test_missing_pools_and_columns(tmp_path: Path):
    with pytest.raises(InputError, match=r"`pool.source` must be an existing file or folder"):
        texts(CaptionPool(str(tmp_path / "nowhere.txt"), "text"))
    with pytest.raises(InputError, match=r"`pool.source` must be a folder with files of \.jsonl"):
        texts(CaptionPool(str(tmp_path), "jsonl"))
    parquet = write_pool(tmp_path, "parquet")
    with pytest.raises(InputError, match=r"`pool.column` must be one of more, caption .*got 'text'"):
        texts(CaptionPool(parquet.source, "parquet", column="text"))
    text = write_pool(tmp_path, "text")
    with pytest.raises(InputError, match=r"`pool.source` must be a Parquet file"):
        texts(CaptionPool(text.source, "parquet"))
