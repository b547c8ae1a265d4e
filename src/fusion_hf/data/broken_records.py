"""Handle broken records: end the run, or skip each one, count it and write it to a file."""

import json
import os
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from fusion_hf.common.errors import InputError
from fusion_hf.common.result_log import encode_line
from fusion_hf.data.record_parsing import ON_BROKEN, OnBroken, RecordProblem


class BrokenRecords:
    """
    Apply the policy for broken records, and count the skipped ones over all processes that write to one file.

    Args:
        on_broken: `error` raises an error at the first broken record, and `skip` writes it to `file`.
        max_skipped: the maximum number of different skipped records. One more ends the run.
        file: a file of JSON lines `{"file", "index", "id", "reason"}`. None uses a temporary file that is removed with
            this object. The file is kept when a run resumes, and earlier skipped records still count.

    Raises:
        InputError: if `on_broken` or `max_skipped` has an invalid value.
    """

    def __init__(self, on_broken: OnBroken = "error", max_skipped: int = 100, file: str | Path | None = None):
        if on_broken not in ON_BROKEN:
            raise InputError(f"`on_broken` must be one of {', '.join(ON_BROKEN)}, got {on_broken!r}.")
        if max_skipped < 0:
            raise InputError(f"`max_skipped` must be an integer of at least 0, got {max_skipped}.")
        self.on_broken: OnBroken = on_broken
        self.max_skipped = max_skipped
        self.seen: set[tuple[str, int]] = set()
        self.read_bytes = 0
        self.file = Path()
        if on_broken == "skip":
            self.file = self._temporary() if file is None else Path(file)

    def _temporary(self) -> Path:
        handle, name = tempfile.mkstemp(prefix="fusion_hf-skipped-", suffix=".jsonl")
        os.close(handle)
        weakref.finalize(self, _remove, Path(name), os.getpid())
        return Path(name)

    def __len__(self) -> int:
        """Return the number of different records that any process has skipped so far."""
        if self.on_broken == "skip":
            self._read()
        return len(self.seen)

    def handle(self, problems: Iterable[tuple[str, int, RecordProblem]]) -> None:
        """
        Handle broken records.

        Args:
            problems: the file, the index in the file, and the problem of each record.

        Raises:
            InputError: for the first record if `on_broken` is `error`, and once there are more than `max_skipped`
                records otherwise.
        """
        if self.on_broken == "error":
            for file, index, problem in problems:
                advice = "Repair it, or set `on_broken` to skip"
                raise InputError(f"{describe(file, index, problem)}. {advice}.") from problem
            return
        try:
            with FileLock(self.lock_file()):
                self._read()
                for file, index, problem in problems:
                    if len(self.seen) > self.max_skipped:
                        break
                    if (file, index) not in self.seen:
                        self._append(file, index, problem)
        except OSError as error:
            raise InputError(f"`skipped_file` {self.file} cannot be written ({error}).") from error
        if len(self.seen) > self.max_skipped:
            advice = "Repair the data, or increase `max_skipped`"
            raise InputError(
                f"More than `max_skipped` = {self.max_skipped} records are broken, see {self.file}. {advice}."
            )

    def lock_file(self) -> Path:
        """Return the path of the lock that a writer holds."""
        return self.file.with_name(f"{self.file.name}.lock")

    def _read(self) -> None:
        """Read complete lines that this or another process has added."""
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.read_bytes)
                content = stream.read()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self.read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self.seen.add((entry["file"], entry["index"]))
            except (ValueError, KeyError, TypeError):  # an incomplete line of a process that was killed
                continue

    def _append(self, file: str, index: int, problem: RecordProblem) -> None:
        entry = {"file": file, "index": index, "id": problem.identity, "reason": str(problem)}
        with self.file.open("ab") as stream:
            is_torn = stream.tell() > self.read_bytes  # the last line is incomplete
            stream.write((b"\n" if is_torn else b"") + encode_line(entry, ascii_only=True))
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": set(), "read_bytes": 0}  # another process reads the file again


def describe(file: str, index: int, problem: RecordProblem) -> str:
    """
    Describe a broken record and its problem.

    Args:
        file: the file of the record.
        index: the index of the record in the file.
        problem: what is wrong with it.
    """
    identity = "" if problem.identity is None else f" (id {problem.identity!r})"
    return f"{file}, record {index}{identity}: {problem}"


def _remove(file: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker must not remove it
        file.unlink(missing_ok=True)
        file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
