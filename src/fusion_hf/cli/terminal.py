"""The streams of the commands, and checks of what they are given; imports nothing heavy."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.common.user_values import is_address

FAILED, USER_ERROR, INTERRUPTED, STOPPED = 1, 2, 130, 143  # exit statuses; the last one after SIGTERM
ADVICE = 200  # characters at the end of an error that is cut: they say what to do
MEGABYTE = 10**6
NAMED_SHARE = 0.05  # of a folder's size, from which on a file of it is named
BAR_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # read when they are imported
STREAMS = (0, 1, 2)  # input, output, errors


def guarded(command: Callable[[], int], debug: bool) -> int:
    """
    Run a command and write an error as one line to the standard error.

    Args:
        command: The command, which returns the exit status.
        debug: Raise errors instead.

    Returns:
        The exit status.
    """
    try:
        prepare_streams()
        status = _flushed(command)
    except InputError as error:
        if debug:
            raise
        return _fail(one_line(error), USER_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:  # who reads our output has enough of it
        _abandon(sys.stdout)
        return FAILED
    except Exception as error:  # the last resort of a command: one line instead of a traceback
        if debug:
            raise
        return _fail(*_described(error))
    return status


class _Output(io.FileIO):
    """The standard output of a process, whose errors say that they are its own."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            _abandon(self)  # the interpreter would write what is left when it ends
            raise InputError(f"The standard output cannot be written: {error.strerror}.") from error


def prepare_streams() -> None:
    """
    Make streams that accept every character: names that are no Unicode, and letters that a terminal lacks.

    A closed stream gets a stand-in; otherwise the next file that is opened would get its number, and its text.

    Raises:
        InputError: If the standard output is closed, or is a device that takes nothing.
    """
    for number in STREAMS:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if (
        not sys.stderr or not sys.stderr.isatty()
    ):  # a file or a pipe gets no bars, whose control characters nobody reads
        for variable in BAR_VARIABLES:
            os.environ.setdefault(variable, "1")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 (it lasts as long as the process)
    if sys.stdout is None:
        raise InputError("The standard output is closed. Redirect it to a file or to /dev/null.")
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper) and os.name == "posix":
        sys.stdout = _named(sys.stdout)


def _named(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The standard output as it is, through `_Output`."""
    raw = _Output(stream.fileno(), "w", closefd=False)
    raw.write(b"")  # which /dev/full refuses
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _flushed(command: Callable[[], int]) -> int:
    """Run a command, and write what it has left in the buffer while errors can still be answered."""
    try:
        status = command()
    except SystemExit:  # of argparse, behind a help text
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _described(error: Exception) -> tuple[str, int]:
    """Describe an error that no command has foreseen, and choose the exit status."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        name = "" if error.filename is None else f"{short_name(str(error.filename))}: "
        return f"{name}{error.strerror}.", USER_ERROR
    kind = type(error).__name__
    return f"{kind}: {one_line(error)} (run the command with --debug to see the traceback)", FAILED


def _fail(message: str, status: int) -> int:
    try:
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
    except OSError:  # nobody is there to be told
        _abandon(sys.stderr)
    return status


def _abandon(stream: Any) -> None:
    """Send what is left in a stream to nowhere, because the interpreter would report it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """Remove control characters, because the text of a model must not control the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def one_line(error: BaseException | str) -> str:
    """Format an error as one line of bounded length."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    longest = error.longest if isinstance(error, InputError) else InputError.longest
    return text if len(text) <= longest else f"{text[: longest - ADVICE]} ... {text[-ADVICE:]}"


def wrote(folder: Path) -> str:
    """Describe the folder that a command wrote: its large files, the number of others, and their sizes in MB."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    large = [name for name in sorted(sizes) if sizes[name] >= NAMED_SHARE * total]
    named = [f"{name} ({sizes[name] / MEGABYTE:,.1f} MB)" for name in large]
    if others := len(sizes) - len(large):
        named.append(f"{others} other files")
    return printable(f"Wrote {folder}: {', '.join(named)}; {total / MEGABYTE:,.1f} MB in all.")


def check_image_exists(source: str) -> None:
    """
    Check that an image exists before the model is loaded, which takes seconds.

    Args:
        source: The name of a file, or an http(s) address.

    Raises:
        InputError: If `source` is neither an address nor a file.
    """
    if is_address(source):
        return
    try:
        path = Path(source)
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError:  # a name longer than any file's
        is_file = is_folder = False
    if is_folder:
        raise InputError(f"{short_name(source)} is a folder. Pass the images in it.")
    if not is_file:
        advice = "Check its name, or put the question in quotation marks"
        raise InputError(f"{short_name(source)!r} is no file. {advice}.")


def check_question(question: str) -> None:
    """
    Check a question.

    Raises:
        InputError: If it is empty, or if it is no text.
    """
    if not question.strip():
        raise InputError("The question is empty. Pass a question.")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # how Python hands over bytes that are no UTF-8
        raise InputError(f"The question must be UTF-8 text, but its character {error.start + 1} is not.") from error
