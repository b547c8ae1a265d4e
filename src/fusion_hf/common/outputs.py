"""Files and folders that a command makes: checked before the work, whole or absent after it. Imports nothing heavy."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from fusion_hf.common.errors import InputError, short_name

DRAFT = ".draft"  # behind the name of a file that is not whole yet
IO_ERROR = "I/O error: "  # in front of the system's words, in errors of safetensors
# In what torch's writer says of a failed write: it raises RuntimeError and keeps the reason to itself.
TORCH_WRITER = ("inline_container", "iostream", "PytorchStreamWriter", "cannot be opened", "Parent directory")
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # among which `write_problem` finds the disk's


def cache_folder() -> Path:
    """Return `$HF_HOME/fusion_hf` if that is set, else `~/.cache/fusion_hf` (or below `$XDG_CACHE_HOME`)."""
    folder = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "fusion_hf"


def write_problem(error: BaseException, folder: Path) -> str | None:
    """
    Return what the disk has against a write; None if the error is not the disk's.

    Args:
        error: one of `WRITE_ERRORS`, from writing into `folder`.
    """
    if isinstance(error, OSError):
        # a library's network error is an OSError as well, without a number
        return None if error.errno is None or isinstance(error, ConnectionError) else error.strerror
    if isinstance(error, SafetensorError) and IO_ERROR in str(error):
        return str(error).rpartition(IO_ERROR)[2]
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in TORCH_WRITER):
        free = shutil.disk_usage(folder).free / 10**9
        return f"torch could not write all of a file, {free:.3f} GB are free on that disk"
    return None


def check_output(output: Path, flag: str = "--output") -> None:
    """
    Refuse a folder that `new_folder` could not make, before the work whose result goes there.

    Raises:
        InputError: if `output` is a file, a folder that is not empty or the root of a disk, or cannot be written.
    """
    shown = short_name(str(output))
    try:
        if output.is_dir() and not any(output.iterdir()):
            if output.is_mount():  # the finished folder is renamed, and nothing can take this one's place
                raise InputError(f"{flag}: {shown} is a mount point; give a new folder in it.")
        elif output.exists() or output.is_symlink():
            raise InputError(f"{flag}: {shown} exists and is not an empty folder; give a new one.")
    except OSError as error:
        raise _unwritable(output, error.strerror, flag) from error
    check_place(output.resolve().parent, flag, output)


def check_place(folder: Path, flag: str, shown: Path | None = None) -> None:
    """
    Refuse a folder that cannot be written or made.

    Args:
        folder: it, or what it will be.
        flag, shown: for the error; default: the folder.

    Raises:
        InputError: if a file is in its place, or the disk refuses.
    """
    try:
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        tempfile.TemporaryDirectory(prefix=".fusion-", dir=place).cleanup()  # permissions alone do not tell
    except OSError as error:
        raise _unwritable(folder if shown is None else shown, error.strerror, flag) from error


@contextmanager
def new_folder(output: Path, flag: str = "--output") -> Iterator[Path]:
    """
    Give a temporary folder beside `output` that takes its name if all goes well, and else disappears.

    Raises:
        InputError: if `output` exists and is not an empty folder, or cannot be written.
    """
    check_output(output, flag)
    place = output.resolve()
    temporary = place.with_name(f".{place.name[:32]}.{uuid.uuid4().hex}.tmp")  # a name may be as long as names can be
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if place.is_dir():
            place.rmdir()  # it is empty; not every system renames onto an existing folder
        temporary.rename(place)
    except WRITE_ERRORS as error:
        reason = write_problem(error, place.parent)
        if reason is None or _is_elsewhere(error, temporary, place):
            raise
        raise _unwritable(output, reason, flag) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_space(folder: Path, size: int) -> None:
    """
    Refuse to begin a write that the disk has no space for.

    Args:
        size: bytes that will be written.

    Raises:
        InputError: if fewer are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{size / 10**9:.3f} GB will be written, and {folder} has {free / 10**9:.3f} GB free.")


def check_new_file(path: Path, flag: str) -> None:
    """
    Refuse a file that could not be written, before the work whose result it gets.

    Raises:
        InputError: if its folder is missing or cannot be written, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise InputError(f"{flag} is {path}, but {path.parent} is no folder; make it first.")
    if path.is_dir():
        raise InputError(f"{flag} is {path}, a folder; allowed: a file, which need not exist.")
    check_place(path.parent, flag, path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """
    Name a file to write in place of `path`, for libraries that write by themselves. It takes the name `path` when all
    of it is on the disk, and is removed if that fails. What a killed process has left is overwritten: a name belongs
    to one task.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + DRAFT)
    try:
        yield draft
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file in place of `path`; see `atomic_path`."""
    with atomic_path(path) as draft, draft.open("wb") as stream:
        yield stream


def sync(path: Path) -> None:
    """Let a file, or the names in a folder, survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_draft(path: Path) -> None:
    """Remove what a killed process has left of a file that may not be written this time."""
    path.with_name(path.name + DRAFT).unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file."""
    with atomic_file(path) as stream:
        stream.write(content)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Write JSON with sorted keys and a line end: the same bytes for the same value."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent)
    return f"{text}\n".encode("utf-8", "backslashreplace")  # half a character becomes JSON's escape of it


def _is_elsewhere(error: BaseException, temporary: Path, place: Path) -> bool:
    """Whether an error names a file that has nothing to do with a new folder."""
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, str):
        return False
    path = Path(name).absolute()
    return temporary not in (path, *path.parents) and path not in (place, *place.parents)


def _unwritable(path: Path, reason: str | None, flag: str) -> InputError:
    return InputError(f"{flag}: {short_name(str(path))} cannot be written: {reason}.")
