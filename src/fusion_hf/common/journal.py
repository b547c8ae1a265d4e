"""The answers of a batch run on disk: a batch that is done survives a kill, and the output is whole or absent."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from filelock import FileLock, Timeout

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import check_new_file

FORMAT = 1
PARTIAL, LOCK, DRAFT = ".partial", ".lock", ".tmp"  # put behind the output's name

Result: TypeAlias = dict[str, Any]  # {"id", "answer"} or {"id", "error"}


class Journal:
    """
    The results of a run by index of their record. As a context, it keeps other processes away from the output.

    The first line of the file beside the output names the run's settings, each further one holds a batch. A line
    without an end was being written when the process was killed, and does not count.

    Args:
        output: the JSONL file that the run makes.

    Raises:
        InputError: on entering, if `output` is finished already, cannot be there, or another process works on it.
    """

    def __init__(self, output: Path):
        self.output = output
        self.path = _beside(output, PARTIAL)
        self.results: dict[int, Result] = {}
        self.lock = FileLock(_beside(output, LOCK))
        self.stream: BinaryIO | None = None

    def __enter__(self) -> "Journal":
        check_output(self.output)
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"output is {self.output}, which another process is working on; wait for it.") from error
        except OSError as error:
            raise InputError(f"output is {self.output}, which cannot be written ({error.strerror}).") from error
        try:
            check_output(self.output)  # which another process may have finished
        except InputError:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            with suppress(OSError):  # of a line that could not be written, which is known by now
                self.stream.close()
        self._release()

    def begin(self, settings: dict[str, Any]) -> None:
        """
        Take up what an earlier run with the same settings has left, and be ready for more.

        Raises:
            InputError: if it had other settings, or what it left is damaged.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        if lines:
            self._check_settings(self._parse(lines[0], 1), settings)
        for number, line in enumerate(lines[1:], start=2):
            entry = self._parse(line, number)
            results = entry.get("results")
            if not isinstance(results, list) or not all(_is_result(pair, settings["records"]) for pair in results):
                raise self._damaged(number)
            self.results.update((index, result) for index, result in results)
        if self.output.exists() and len(self.results) < settings["records"]:
            raise InputError(
                f"output is {self.output}, which exists already, while {self.path} is the beginning of another run; "
                "remove one of them."
            )
        self.stream = self.path.open("r+b" if content else "wb")
        self.stream.truncate(len(whole))
        self.stream.seek(len(whole))
        if not lines:
            self._write({"format": FORMAT, "settings": settings})
            _sync_folder(self.path.parent)

    def append(self, results: dict[int, Result]) -> None:
        """Add the results of a batch; they are on the disk when this returns.

        Raises:
            InputError: if they cannot be written.
        """
        self.results.update(results)
        self._write({"results": list(results.items())})

    def finish(self) -> None:
        """Make the output, all results in their order, and remove the journal.

        Raises:
            InputError: if it cannot be written.
        """
        draft = _beside(self.output, DRAFT)
        try:
            with draft.open("wb") as stream:
                for index in sorted(self.results):
                    stream.write(_line(self.results[index]))
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(self.output)
            _sync_folder(self.output.parent)
        except OSError as error:
            raise self._unwritable(self.output, error) from error
        if self.stream is not None:  # Windows removes no open file
            self.stream.close()
        self.path.unlink()

    def _check_settings(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        before = header.get("settings")
        if header.get("format") != FORMAT or not isinstance(before, dict):
            raise self._damaged(1)
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{name} is {value}, but {self.path} was begun with {before.get(name)}; give the same again, or "
                    "remove that file to begin anew."
                )

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(number) from error
        if not isinstance(entry, dict):
            raise self._damaged(number)
        return entry

    def _damaged(self, number: int) -> InputError:
        return InputError(f"{self.path} is damaged in line {number}; remove it to begin anew.")

    def _unwritable(self, path: Path, error: OSError) -> InputError:
        advice = f"{len(self.results)} results are kept in {self.path}: give the same command again"
        return InputError(f"{path} cannot be written ({error.strerror}); {advice}.")

    def _write(self, entry: dict[str, Any]) -> None:
        assert self.stream is not None, "begin comes first"
        try:
            self.stream.write(_line(entry))
            self.stream.flush()
            os.fsync(self.stream.fileno())
        except OSError as error:
            raise self._unwritable(self.path, error) from error

    def _release(self) -> None:
        # whoever still gets the removed file's lock is stopped by the output, as it would be without
        if self.output.exists() and not self.path.exists():
            Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()


def check_output(output: Path) -> None:
    """
    Refuse an output that no run can make, before a model is loaded.

    Raises:
        InputError: if it is finished already, or cannot be there.
    """
    check_new_file(output, "output")
    # with a journal beside it, the run was killed between the output's last byte and the journal's end
    if output.exists() and not _beside(output, PARTIAL).exists():
        raise InputError(f"output is {output}, which exists already; remove it, or give another name.")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _line(entry: dict[str, Any]) -> bytes:
    # half a character, which an id may have, becomes JSON's escape of it
    return f"{json.dumps(entry, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")


def _is_result(pair: Any, count: int) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], dict):
        return False
    return isinstance(pair[0], int) and 0 <= pair[0] < count


def _sync_folder(folder: Path) -> None:
    """Let a new name survive a power cut as well."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
