"""What happens to broken records: the run ends, or each is left out, counted and written down."""

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
    The policy, and the count of skipped records over all processes that write to one file.

    Args:
        on_broken: `error` raises for the first broken record; `skip` writes it down.
        max_skipped: more different records than these end the run.
        file: JSON lines `{"file", "index", "id", "reason"}`; default: a temporary file, removed with this object.
            It is kept when a run is resumed: what was skipped before still counts.
    """

    def __init__(self, on_broken: OnBroken = "error", max_skipped: int = 100, file: str | Path | None = None):
        if on_broken not in ON_BROKEN:
            raise InputError(f"on_broken: {on_broken!r}; allowed: {', '.join(ON_BROKEN)}.")
        if max_skipped < 0:
            raise InputError(f"max_skipped: {max_skipped}; allowed: whole numbers from 0.")
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
        """Different records skipped so far, by any process."""
        if self.on_broken == "skip":
            self._read()
        return len(self.seen)

    def handle(self, problems: Iterable[tuple[str, int, RecordProblem]]) -> None:
        """
        Deal with broken records: file, index in it, problem.

        Raises:
            InputError: for the first one under `error`; under `skip`, once they are too many.
        """
        if self.on_broken == "error":
            for file, index, problem in problems:
                advice = "repair it, or set on_broken to skip"
                raise InputError(f"{describe(file, index, problem)}; {advice}.") from problem
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
            raise InputError(f"skipped_file: {self.file} cannot be written ({error}).") from error
        if len(self.seen) > self.max_skipped:
            advice = "repair the data, or allow more"
            raise InputError(f"max_skipped: over {self.max_skipped} records are broken, see {self.file}; {advice}.")

    def lock_file(self) -> Path:
        """Name the lock that a writer holds."""
        return self.file.with_name(f"{self.file.name}.lock")

    def _read(self) -> None:
        """Whole lines that were added by this or another process."""
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
            except (ValueError, KeyError, TypeError):  # half of a line, of a process that was killed
                continue

    def _append(self, file: str, index: int, problem: RecordProblem) -> None:
        entry = {"file": file, "index": index, "id": problem.identity, "reason": str(problem)}
        with self.file.open("ab") as stream:
            is_torn = stream.tell() > self.read_bytes  # half a line is at the end
            stream.write((b"\n" if is_torn else b"") + encode_line(entry, ascii_only=True))
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": set(), "read_bytes": 0}  # another process reads the file anew


def describe(file: str, index: int, problem: RecordProblem) -> str:
    """Say which record it is and what is wrong with it."""
    identity = "" if problem.identity is None else f" (id {problem.identity!r})"
    return f"{file}, record {index}{identity}: {problem}"


def _remove(file: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a worker that was forked off
        file.unlink(missing_ok=True)
        file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
