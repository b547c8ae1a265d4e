"""Stream captions from text, JSON Lines and Parquet files and Hub data sets, with limits for untrusted files."""

import json
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.synthesis.run_config import CaptionPool

SUFFIXES = {"text": (".txt",), "jsonl": (".jsonl",), "parquet": (".parquet",)}
MAX_LINE_BYTES = 2**20
MAX_CAPTION = 4000  # maximum number of characters
ROWS = 1024  # rows of a Parquet file that are read at a time
READ_BYTES = 2**16


class Caption(NamedTuple):
    """One entry of a pool. `problem` says why there is no `text`."""

    text: str
    problem: str | None = None


def read_captions(pool: CaptionPool) -> Generator[Caption, None, None]:
    """
    Read all captions in the order of their files, in constant memory. Invalid captions are reported in their place.

    Args:
        pool: the pool.

    Raises:
        InputError: if the pool is missing or cannot be read.
    """
    yield from islice(_read(pool), pool.limit)


def check_pool(pool: CaptionPool) -> None:
    """
    Check that the pool has a caption before a run starts. Hub data sets are checked during the run.

    Args:
        pool: the pool.

    Raises:
        InputError: if the pool is missing, cannot be read or is empty.
    """
    if pool.kind == "hub":
        return
    captions = read_captions(pool)
    try:
        if next(captions, None) is None:
            raise InputError(
                f"`pool.source` must contain at least one caption, got none in {short_name(pool.source)}."
            )
    finally:
        captions.close()


def _read(pool: CaptionPool) -> Iterator[Caption]:
    if pool.kind == "hub":
        yield from (clean_caption(row.get(pool.column)) for row in _hub_rows(pool))
        return
    for path in _files(pool):
        try:
            if pool.kind == "parquet":
                yield from (clean_caption(row[pool.column]) for row in _parquet_rows(path, pool.column))
                continue
            with path.open("rb") as stream:
                column = pool.column if pool.kind == "jsonl" else None
                yield from (_line_caption(line, column) for line in _lines(stream))
        except OSError as error:
            raise InputError(f"`pool.source` {path} cannot be read ({error.strerror}).") from error


def _files(pool: CaptionPool) -> list[Path]:
    source, suffixes = Path(pool.source).expanduser(), SUFFIXES[pool.kind]
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix in suffixes and path.is_file())
        if not files:
            raise InputError(f"`pool.source` must be a folder with files of {', '.join(suffixes)}, got {source}.")
        return files
    if not source.is_file():
        raise InputError(f"`pool.source` must be an existing file or folder, got {short_name(str(source))}.")
    return [source]


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """
    Yield lines without their ends, and None for a line that is too long, of which only the beginning is in
    memory.
    """
    while line := stream.readline(MAX_LINE_BYTES):
        if line.endswith(b"\n") or len(line) < MAX_LINE_BYTES:
            yield line.rstrip(b"\r\n")
            continue
        while rest := stream.readline(READ_BYTES):
            if rest.endswith(b"\n"):
                break
        yield None


def _line_caption(line: bytes | None, column: str | None) -> Caption:
    """Return the caption in a line of text, or in a field of a line of JSON."""
    if line is None:
        return Caption("", f"a line has more than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode("utf-8-sig")
        value = text if column is None else json.loads(text)
    except (ValueError, RecursionError):
        return Caption("", "a line is no UTF-8" if column is None else "a line is no JSON")
    if column is not None:
        value = value.get(column) if isinstance(value, dict) else None
    return clean_caption(value)


def clean_caption(value: Any) -> Caption:
    """
    Convert a value to a text on one line without control characters, or say why it is not a caption.

    Args:
        value: the value.
    """
    if not isinstance(value, str):
        return Caption("", f"the caption is {type(value).__name__}, no text")
    if len(value) > MAX_CAPTION:
        return Caption("", f"the caption has more than {MAX_CAPTION} characters")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in value).split())
    return Caption(text) if text else Caption("", "the caption is empty")


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise InputError(f"`pool.column` must be one of {short_name(names)} of {path}, got {column!r}.")
            for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"`pool.source` must be a Parquet file, got {path} ({error}).") from error


def _hub_rows(pool: CaptionPool) -> Iterator[dict[str, Any]]:
    from fusion_hf.data.table_sources import load_hub

    dataset = load_hub(pool.source, pool.split, streaming=True)
    if dataset.column_names is not None and pool.column not in dataset.column_names:
        raise InputError(
            f"`pool.column` must be one of {', '.join(dataset.column_names)} of {pool.source}, got {pool.column!r}."
        )
    yield from dataset.select_columns([pool.column]) if dataset.column_names is not None else dataset
