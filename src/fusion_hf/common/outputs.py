"""Output files and folders of commands. They are checked before work starts, and are complete or absent after it."""

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

DRAFT = ".draft"  # suffix of a file that is not complete yet
IO_ERROR = "I/O error: "  # precedes the system's message in errors of safetensors
# Parts of the messages of torch's writer, which raises RuntimeError without a reason when a write fails.
TORCH_WRITER = ("inline_container", "iostream", "PytorchStreamWriter", "cannot be opened", "Parent directory")
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # `write_problem` finds those that the disk causes


def cache_folder() -> Path:
    """Return `$HF_HOME/fusion_hf` if that is set, else `~/.cache/fusion_hf` (or below `$XDG_CACHE_HOME`)."""
    folder = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "fusion_hf"


def write_problem(error: BaseException, folder: Path) -> str | None:
    """
    Return why a disk refused a write, or None if the disk did not cause the error.

    Args:
        error: One of `WRITE_ERRORS`, raised while writing into `folder`.
        folder: Folder on the disk.
    """
    if isinstance(error, OSError):
        # network errors of libraries are OSErrors as well, without a number
        return None if error.errno is None or isinstance(error, ConnectionError) else error.strerror
    if isinstance(error, SafetensorError) and IO_ERROR in str(error):
        return str(error).rpartition(IO_ERROR)[2]
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in TORCH_WRITER):
        free = shutil.disk_usage(folder).free / 10**9
        return f"torch could not write the whole file, {free:.3f} GB are free on that disk"
    return None


def check_output(output: Path, flag: str = "--output") -> None:
    """
    Check that `new_folder` can create a folder, before the work whose result goes there.

    Args:
        output: Folder to create.
        flag: Option of the command line, for errors.

    Raises:
        InputError: If `output` is a file, a folder that is not empty, or the root of a disk, or is not writable.
    """
    shown = short_name(str(output))
    try:
        if output.is_dir() and not any(output.iterdir()):
            if output.is_mount():  # the finished folder is renamed, which cannot replace a mount point
                raise InputError(f"{flag} must not be a mount point, got {shown}. Choose a new folder in it.")
        elif output.exists() or output.is_symlink():
            raise InputError(f"{flag} must be a new or an empty folder, got {shown}, which exists.")
    except OSError as error:
        raise _unwritable(output, error.strerror, flag) from error
    check_place(output.resolve().parent, flag, output)


def check_place(folder: Path, flag: str, shown: Path | None = None) -> None:
    """
    Check that a folder can be written or created.

    Args:
        folder: Folder that exists or will be created.
        flag: Option of the command line, for errors.
        shown: Path for errors. Defaults to the folder.

    Raises:
        InputError: If a file is in its place, or if the disk refuses.
    """
    try:
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        tempfile.TemporaryDirectory(prefix=".fusion-", dir=place).cleanup()  # permissions alone do not suffice
    except OSError as error:
        raise _unwritable(folder if shown is None else shown, error.strerror, flag) from error


@contextmanager
def new_folder(output: Path, flag: str = "--output") -> Iterator[Path]:
    """
    Provide a temporary folder that is renamed to `output` on success, and removed otherwise.

    Args:
        output: Folder to create.
        flag: Option of the command line, for errors.

    Yields:
        The temporary folder, beside `output`.

    Raises:
        InputError: If `output` exists and is not an empty folder, or if it cannot be written.
    """
    check_output(output, flag)
    place = output.resolve()
    temporary = place.with_name(f".{place.name[:32]}.{uuid.uuid4().hex}.tmp")  # the name may have the maximum length
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if place.is_dir():
            place.rmdir()  # it is empty; not every system can rename to an existing folder
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
    Check that a disk has enough free space for a write.

    Args:
        folder: Folder on the disk.
        size: Number of bytes to write.

    Raises:
        InputError: If fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        needed, free_gb = size / 10**9, free / 10**9
        raise InputError(f"{folder} must have {needed:.3f} GB of free space, got {free_gb:.3f} GB.")


def check_new_file(path: Path, flag: str) -> None:
    """
    Check that a file can be written, before the work whose result it gets.

    Args:
        path: File to write.
        flag: Option of the command line, for errors.

    Raises:
        InputError: If its folder is missing or not writable, or if `path` is a folder.
    """
    if not path.parent.is_dir():
        raise InputError(f"{flag} must be in an existing folder, got {path}. Create {path.parent} first.")
    if path.is_dir():
        raise InputError(f"{flag} must be a file, got the folder {path}.")
    check_place(path.parent, flag, path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """
    Provide a temporary name for a file that a library writes. The file gets its name when it is completely on disk.

    If writing fails, the file is removed. What a killed process has left is overwritten, so only one task may write to
    a path.

    Args:
        path: Final path of the file.

    Yields:
        The temporary path.
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
    """Open a new file that replaces `path` when it is complete, see `atomic_path`."""
    with atomic_path(path) as draft, draft.open("wb") as stream:
        yield stream


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk so that they survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_draft(path: Path) -> None:
    """Remove the incomplete file that a killed process has left, when `path` will not be written again."""
    path.with_name(path.name + DRAFT).unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent."""
    with atomic_file(path) as stream:
        stream.write(content)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Encode JSON with sorted keys and a line end, so that equal values give equal bytes."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent)
    return f"{text}\n".encode("utf-8", "backslashreplace")  # lone surrogates become JSON escapes


def _is_elsewhere(error: BaseException, temporary: Path, place: Path) -> bool:
    """Return whether an error names a file outside the new folder."""
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, str):
        return False
    path = Path(name).absolute()
    return temporary not in (path, *path.parents) and path not in (place, *place.parents)


def _unwritable(path: Path, reason: str | None, flag: str) -> InputError:
    return InputError(f"{flag}: {short_name(str(path))} cannot be written: {reason}.")
