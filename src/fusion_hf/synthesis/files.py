"""Files that are whole or absent, whenever a process is killed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

DRAFT = ".draft"  # behind the name of a file that is not whole yet


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """
    A file that gets its name when all of it is on the disk, and is removed if that fails. What a killed process has
    left is overwritten: a name belongs to one task.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + DRAFT)
    try:
        with draft.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def remove_draft(path: Path) -> None:
    """Remove what a killed process has left of a file that may not be written this time."""
    with suppress(FileNotFoundError):
        path.with_name(path.name + DRAFT).unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file."""
    with atomic_file(path) as stream:
        stream.write(content)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """JSON with sorted keys and a line end; the same bytes for the same value."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent)
    return f"{text}\n".encode("utf-8", "backslashreplace")  # half a character becomes JSON's escape of it
