"""What the commands write to and read from, apart from answers; imports nothing heavy."""

import io
import sys
from pathlib import Path

from fusion_hf.errors import InputError, short_name

FAILED, USER_ERROR, INTERRUPTED, STOPPED = 1, 2, 130, 143  # exit statuses; the last one after SIGTERM
LONGEST_ERROR = 600  # characters: a library may list every tensor of a model
ADDRESSES = ("http://", "https://")


def make_streams_tolerant() -> None:
    """Let no character stop a command: not a name that is no Unicode, not a terminal that lacks a letter."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def printable(text: str) -> str:
    """The text without control characters: what a model writes must not command the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def one_line(error: BaseException | str) -> str:
    """What an error says, in one line and not at any length."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]} ..."


def check_picture_exists(source: str) -> None:
    """Cheap and early: loading the model first takes seconds.

    Raises:
        InputError: if `source` is neither an address nor a file.
    """
    if source.startswith(ADDRESSES):
        return
    try:
        path = Path(source)
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError:  # a name longer than any file's
        is_file = is_folder = False
    if is_folder:
        raise InputError(f"{short_name(source)} is a folder; give the pictures in it.")
    if not is_file:
        advice = "check its name, or put the question in quotation marks"
        raise InputError(f"{short_name(source)!r} is no file; {advice}.")


def check_question(question: str) -> None:
    """
    Raises:
        InputError: if there is none.
    """
    if not question.strip():
        raise InputError("The question is empty; ask something.")
