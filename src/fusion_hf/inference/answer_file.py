"""The answers of a batch run on disk: a batch that is done survives a kill, and the output is whole or absent."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import atomic_file, check_new_file
from fusion_hf.common.result_log import ResultLog, damaged_line, encode_line

FORMAT = 1
ANSWERS, LLAVA = OUTPUT_FORMATS = ("answers", "llava")  # of the lines of an output
PARTIAL, LOCK = ".partial", ".lock"  # put behind the output's name

Result: TypeAlias = dict[str, Any]  # {"id", "answer"} or {"id", "error"}


class AnswerFile:
    """
    Keep the results of a run by index of their record. As a context, keep other processes away from the output.

    The first line of the log beside the output names the run's settings, each further one holds a batch.

    Args:
        output: the JSONL file that the run makes.
        as_line: makes a line of it of a record's index and result; default: the result itself.

    Raises:
        InputError: on entering, if `output` is finished already, cannot be there, or another process works on it.
    """

    def __init__(self, output: Path, as_line: Callable[[int, Result], dict[str, Any]] | None = None):
        self.output = output
        self.as_line = as_line
        self.path = _beside(output, PARTIAL)
        self.results: dict[int, Result] = {}
        self.log = ResultLog(self.path, _beside(output, LOCK), "remove it to begin anew")

    def __enter__(self) -> "AnswerFile":
        check_output(self.output)
        try:
            acquired = self.log.acquire()
        except OSError as error:
            raise InputError(f"output is {self.output}, which cannot be written ({error.strerror}).") from error
        if not acquired:
            raise InputError(f"output is {self.output}, which another process is working on; wait for it.")
        try:
            check_output(self.output)  # which another process may have finished
        except InputError:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a line that could not be written, which is known by now
            self.log.close()
        self._release()

    def begin(self, settings: dict[str, Any]) -> None:
        """
        Take up what an earlier run with the same settings has left, and be ready for more.

        Raises:
            InputError: if it had other settings, or what it left is damaged.
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
                f"output is {self.output}, which exists already, while {self.path} is the beginning of another run; "
                "remove one of them."
            )
        self.log.open()
        if not entries:
            self._write({"format": FORMAT, "settings": settings})

    def append(self, results: dict[int, Result]) -> None:
        """Add the results of a batch; they are on the disk when this returns.

        Raises:
            InputError: if they cannot be written.
        """
        self.results.update(results)
        self._write({"results": list(results.items())})

    def finish(self) -> None:
        """Make the output, all results in their order, and remove the log.

        Raises:
            InputError: if it cannot be written.
        """
        try:
            with atomic_file(self.output) as stream:
                for index in sorted(self.results):
                    result = self.results[index]
                    stream.write(encode_line(result if self.as_line is None else self.as_line(index, result)))
        except OSError as error:
            raise self._unwritable(self.output, error) from error
        self.log.close()  # Windows removes no open file
        self.path.unlink()

    def _check_settings(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        before = header.get("settings")
        if header.get("format") != FORMAT or not isinstance(before, dict):
            raise damaged_line(self.path, 1, self.log.advice)
        for name in dict.fromkeys([*settings, *before]):  # a default may be absent from either
            if before.get(name) != settings.get(name):
                raise InputError(
                    f"{name} is {settings.get(name)}, but {self.path} was begun with {before.get(name)}; give "
                    "the same again, or remove that file to begin anew."
                )

    def _unwritable(self, path: Path, error: OSError) -> InputError:
        advice = f"{len(self.results)} results are kept in {self.path}: give the same command again"
        return InputError(f"{path} cannot be written ({error.strerror}); {advice}.")

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            self.log.append([entry])
        except OSError as error:
            raise self._unwritable(self.path, error) from error

    def _release(self) -> None:
        # whoever still gets the removed file's lock is stopped by the output, as it would be without
        self.log.release(remove=self.output.exists() and not self.path.exists())


def check_output(output: Path) -> None:
    """
    Refuse an output that no run can make, before a model is loaded.

    Raises:
        InputError: if it is finished already, or cannot be there.
    """
    check_new_file(output, "output")
    # with a log beside it, the run was killed between the output's last byte and the log's end
    if output.exists() and not _beside(output, PARTIAL).exists():
        raise InputError(f"output is {output}, which exists already; remove it, or give another name.")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _is_result(pair: Any, count: int) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], dict):
        return False
    return isinstance(pair[0], int) and 0 <= pair[0] < count
