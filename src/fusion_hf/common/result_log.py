"""Append results to a file in which each is safe once it is written, also from a kill."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import sync


class ResultLog:
    """
    Append lines of JSON to a file that one process at a time may write.

    A line without an end was being written when the process was killed: it does not count, and is overwritten.

    Args:
        path: the file.
        lock: a file that keeps other processes away.
        advice: what to do about a damaged line, for errors.
        ascii_only: whether characters outside ASCII are written as JSON's escapes.
    """

    def __init__(self, path: Path, lock: Path, advice: str, ascii_only: bool = False):
        self.path = path
        self.advice = advice
        self.ascii_only = ascii_only
        self._lock = FileLock(lock)
        self._stream: BinaryIO | None = None

    def acquire(self) -> bool:
        """
        Keep other processes away until `release`.

        Returns:
            False if another process is writing the file.

        Raises:
            OSError: if there can be no lock.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self, remove: bool = False) -> None:
        """Let other processes in; with `remove`, the file that serves as lock goes."""
        if remove:
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def read(self) -> list[dict[str, Any]]:
        """See `read_log`."""
        return read_log(self.path, self.advice)

    def open(self) -> None:
        """
        Be ready to append behind the last whole line.

        Raises:
            OSError: if the file cannot be written.
        """
        size = len(_whole_lines(self.path))
        self._stream = self.path.open("r+b" if self.path.exists() else "wb")
        self._stream.truncate(size)
        self._stream.seek(size)
        if not size:
            sync(self.path.parent)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """
        Add a line for each entry; all of them are on the disk when this returns.

        Raises:
            OSError: if they cannot be written.
        """
        assert self._stream is not None, "open comes first"
        for entry in entries:
            self._stream.write(encode_line(entry, self.ascii_only))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """
        Close the file; the lock stays.

        Raises:
            OSError: if what `append` could not write cannot be written now either.
        """
        if self._stream is not None:
            self._stream.close()


def encode_line(entry: dict[str, Any], ascii_only: bool = False) -> bytes:
    """Encode an entry as a line of JSON."""
    # half a character, which an id may have, becomes JSON's escape of it
    return f"{json.dumps(entry, ensure_ascii=ascii_only)}\n".encode("utf-8", "backslashreplace")


def read_log(path: Path, advice: str) -> list[dict[str, Any]]:
    """
    Read the entries of all whole lines of a log; none if there is no file.

    Raises:
        InputError: if a line is no object of JSON.
    """
    entries = []
    for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise damaged_line(path, number, advice) from error
        if not isinstance(entry, dict):
            raise damaged_line(path, number, advice)
        entries.append(entry)
    return entries


def damaged_line(path: Path, number: int, advice: str) -> InputError:
    """Return the error of a line that no log has."""
    return InputError(f"{path} is damaged in line {number}; {advice}.")


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]
