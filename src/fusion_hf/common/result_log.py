"""A log to which results are appended. Results that are written survive a kill of the process."""

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
    A file of JSON lines to which one process at a time may append.

    A line without an end was being written when the process was killed. It is ignored and overwritten.

    Args:
        path: The file.
        lock: File that serves as a lock between processes.
        advice: What to do about a damaged line, for errors.
        ascii_only: Whether to write characters outside ASCII as JSON escapes.
    """

    def __init__(self, path: Path, lock: Path, advice: str, ascii_only: bool = False):
        self.path = path
        self.advice = advice
        self.ascii_only = ascii_only
        self._lock = FileLock(lock)
        self._stream: BinaryIO | None = None

    def acquire(self) -> bool:
        """
        Lock the file against other processes until `release`.

        Returns:
            False if another process holds the lock.

        Raises:
            OSError: If the lock cannot be created.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self, remove: bool = False) -> None:
        """Release the lock. With `remove`, remove the lock file as well."""
        if remove:
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def read(self) -> list[dict[str, Any]]:
        """Read the entries of all whole lines, see `read_log`."""
        return read_log(self.path, self.advice)

    def open(self) -> None:
        """
        Open the file to append behind the last whole line.

        Raises:
            OSError: If the file cannot be written.
        """
        size = len(_whole_lines(self.path))
        self._stream = self.path.open("r+b" if self.path.exists() else "wb")
        self._stream.truncate(size)
        self._stream.seek(size)
        if not size:
            sync(self.path.parent)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """
        Append a line for each entry. All lines are on the disk when this returns.

        Args:
            entries: JSON objects.

        Raises:
            OSError: If they cannot be written.
        """
        assert self._stream is not None, "open comes first"
        for entry in entries:
            self._stream.write(encode_line(entry, self.ascii_only))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """
        Close the file and keep the lock.

        Raises:
            OSError: If lines that `append` could not write cannot be written now either.
        """
        if self._stream is not None:
            self._stream.close()


def encode_line(entry: dict[str, Any], ascii_only: bool = False) -> bytes:
    """Encode an entry as a line of JSON."""
    # lone surrogates, which an id may contain, become JSON escapes
    return f"{json.dumps(entry, ensure_ascii=ascii_only)}\n".encode("utf-8", "backslashreplace")


def read_log(path: Path, advice: str) -> list[dict[str, Any]]:
    """
    Read the entries of all whole lines of a log.

    Args:
        path: The file. A missing file has no entries.
        advice: What to do about a damaged line, for errors.

    Raises:
        InputError: If a line is not a JSON object.
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
    """Create the error for a line that is not a valid entry."""
    return InputError(f"{path} is damaged in line {number}; {advice}.")


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]
