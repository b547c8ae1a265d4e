"""Answers of a batch run on disk. Finished batches survive a kill, and the output is complete or absent."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import atomic_file, check_new_file
from fusion_hf.common.result_log import ResultLog, damaged_line, encode_line

FORMAT = 1
ANSWERS, LLAVA = OUTPUT_FORMATS = ("answers", "llava")  # of the lines of an output
PARTIAL, LOCK = ".partial", ".lock"  # suffixes of the output's name

Result: TypeAlias = dict[str, Any]  # {"id", "answer"} or {"id", "error"}


class AnswerFile:
    """
    Keeps the results of a run by the indices of their records. As a context manager, it locks the output.

    The log beside the output has one line with the settings of the run, and one line for each batch.

    Args:
        output: JSONL file that the run writes.
        as_line: Function that converts a record's index and result to a line of the output. Defaults to the result.

    Raises:
        InputError: On entering, if `output` is already finished, cannot be written, or is locked by another process.
    """

    def __init__(self, output: Path, as_line: Callable[[int, Result], dict[str, Any]] | None = None):
        self.output = output
        self.as_line = as_line
        self.path = _beside(output, PARTIAL)
        self.results: dict[int, Result] = {}
        self.log = ResultLog(self.path, _beside(output, LOCK), "remove it to begin again")

    def __enter__(self) -> "AnswerFile":
        check_output(self.output)
        try:
            acquired = self.log.acquire()
        except OSError as error:
            raise InputError(f"`output` must be a writable file, got {self.output} ({error.strerror}).") from error
        if not acquired:
            raise InputError(f"Another process is writing `output`, {self.output}. Wait until it has finished.")
        try:
            check_output(self.output)  # another process may have finished it
        except InputError:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a line that could not be written, which has been reported
            self.log.close()
        self._release()

    def begin(self, settings: dict[str, Any]) -> None:
        """
        Resume an earlier run with the same settings, or begin a new run.

        Args:
            settings: Settings on which the answers depend, and the number of `records`.

        Raises:
            InputError: If the earlier run had other settings, or if its log is damaged.
        """
        entries = self.log.read()
        if entries:
            self._check_settings(entries[0], settings)
        for number, entry in enumerate(entries[1:], start=2):
            results = entry.get("results")
            if not isinstance(results, list) or not all(_is_result(pair, settings["records"]) for pair in results):
                raise damaged_line(self.path, number, self.log.advice)
            self.results.update((index, result) for index, result in results)
        if self.output.exists() and len(self.results) < settings["records"]:
            raise InputError(
                f"`output`, {self.output}, exists, but {self.path} is the log of another run. Remove one of the two "
                "files."
            )
        self.log.open()
        if not entries:
            self._write({"format": FORMAT, "settings": settings})

    def append(self, results: dict[int, Result]) -> None:
        """
        Append the results of a batch. They are on the disk when this returns.

        Args:
            results: Results by the indices of their records.

        Raises:
            InputError: If the results cannot be written.
        """
        self.results.update(results)
        self._write({"results": list(results.items())})

    def finish(self) -> None:
        """
        Write the output with all results in their order, and remove the log.

        Raises:
            InputError: If the output cannot be written.
        """
        try:
            with atomic_file(self.output) as stream:
                for index in sorted(self.results):
                    result = self.results[index]
                    stream.write(encode_line(result if self.as_line is None else self.as_line(index, result)))
        except OSError as error:
            raise self._unwritable(self.output, error) from error
        self.log.close()  # Windows cannot remove open files
        self.path.unlink()

    def _check_settings(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        before = header.get("settings")
        if header.get("format") != FORMAT or not isinstance(before, dict):
            raise damaged_line(self.path, 1, self.log.advice)
        for name in dict.fromkeys([*settings, *before]):  # a default may be absent from either
            if before.get(name) != settings.get(name):
                raise InputError(
                    f"`{name}` must be {before.get(name)}, as when the run in {self.path} began, got "
                    f"{settings.get(name)}. Remove that file to begin again."
                )

    def _unwritable(self, path: Path, error: OSError) -> InputError:
        advice = f"{len(self.results)} results are kept in {self.path}. Run the same command again"
        return InputError(f"{path} cannot be written ({error.strerror}). {advice}.")

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            self.log.append([entry])
        except OSError as error:
            raise self._unwritable(self.path, error) from error

    def _release(self) -> None:
        # another process that still gets the lock on the removed file stops when it sees the finished output
        self.log.release(remove=self.output.exists() and not self.path.exists())


def check_output(output: Path) -> None:
    """
    Check that a run can write an output, before a model is loaded.

    Args:
        output: JSONL file that the run writes.

    Raises:
        InputError: If the output is already finished or cannot be written.
    """
    check_new_file(output, "output")
    # a log beside the output means that the run was killed after the output's last byte
    if output.exists() and not _beside(output, PARTIAL).exists():
        raise InputError(f"`output` must be a new file, got {output}, which exists. Remove it or choose another name.")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _is_result(pair: Any, count: int) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], dict):
        return False
    return isinstance(pair[0], int) and 0 <= pair[0] < count
