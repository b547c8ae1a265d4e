"""Which checkpoints of a run are complete, and how a run is asked for a last one.

A checkpoint is a folder of many files, written by several processes, and a run can die at any moment of that. So the
last thing written is a manifest, `complete.json`, which names every file and its size: from a folder without it, or
one that does not agree with it, no run resumes.
"""

import json
import logging
import os
import re
import shutil
import signal
import stat
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import FrameType

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fusion_hf.common.errors import LONGEST_NAME, InputError
from fusion_hf.common.outputs import WRITE_ERRORS, remove_draft, sync, write_atomically, write_problem

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 2**24  # some 100 000 files
REPEAT_SECONDS = 10.0
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
INCOMPLETE, SUPERSEDED = "incomplete", "superseded"


class CheckpointError(InputError):
    """Something could not be written; says which checkpoint is the last complete one."""


def seal(folder: Path) -> None:
    """Declare a checkpoint complete. For the process that writes it, when all others have written their part.

    All is on the disk before the manifest is there, also when the machine loses power.
    """
    manifest = folder / MANIFEST
    remove_draft(manifest)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != manifest):
        sync(path)
        files[path.relative_to(folder).as_posix()] = path.stat().st_size
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        sync(inner)
    sync(folder)
    content = json.dumps({"format": MANIFEST_FORMAT, "files": files}, indent=1)
    write_atomically(manifest, f"{content}\n".encode())
    sync(folder.parent)


def unseal(folder: Path) -> None:
    """Declare a checkpoint incomplete, before anything in it changes."""
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink(missing_ok=True)  # another process may have been faster
        sync(folder)


def problem(folder: Path) -> str | None:
    """Say why a checkpoint is not complete, in a few words; None if it is."""
    manifest = folder / MANIFEST
    try:
        found = manifest.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MANIFEST_BYTES:
            return f"its {MANIFEST} is no file of at most {MAX_MANIFEST_BYTES} bytes"
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its writing did not end"
    except (OSError, ValueError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    if not isinstance(content, dict) or content.get("format") != MANIFEST_FORMAT:
        return f"its {MANIFEST} is not of format {MANIFEST_FORMAT}"
    files = content.get("files")
    if not isinstance(files, dict) or not files:
        return f"its {MANIFEST} lists no files"
    for name, size in files.items():
        if (reason := _problem_of_file(folder, name, size)) is not None:
            return reason
    return None


def _problem_of_file(folder: Path, name: str, size: object) -> str | None:
    """`name` and `size` are a stranger's: any text, any JSON."""
    shown = repr(name[:LONGEST_NAME])
    path = PureWindowsPath(name)  # knows drives and backslashes besides POSIX' rules
    if path.anchor or ".." in path.parts or "\\" in name:
        return f"its {MANIFEST} names {shown}, which is not in the folder"
    try:
        found = (folder / PurePosixPath(name)).stat()
    except FileNotFoundError:
        return f"{shown} is missing"
    except (OSError, ValueError) as error:  # ValueError: a null byte or a lone surrogate
        return f"{shown} cannot be read ({type(error).__name__})"
    if not stat.S_ISREG(found.st_mode):
        return f"{shown} is not a file"
    return None if found.st_size == size else f"{shown} has not the size that its {MANIFEST} says"


def is_complete(folder: Path) -> bool:
    """Return whether a checkpoint's manifest is there and agrees with its files' sizes."""
    return problem(folder) is None


def find_last(run_dir: Path) -> Path | None:
    """Find the complete checkpoint of the highest step; None if there is none."""
    return next((folder for folder in reversed(_checkpoints(run_dir)) if is_complete(folder)), None)


def _checkpoints(run_dir: Path) -> list[Path]:
    """Complete or not, by step."""
    if not run_dir.is_dir():
        return []
    named = [path for path in run_dir.iterdir() if NAME.fullmatch(path.name) is not None and path.is_dir()]
    return sorted(named, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def set_aside(run_dir: Path) -> list[Path]:
    """Rename incomplete checkpoints, so that no run resumes from them or writes into them; nothing is deleted.

    For one process, before any of them looks for the last checkpoint. Returns the new names.
    """
    renamed = []
    for folder in _checkpoints(run_dir):
        if (reason := problem(folder)) is not None:
            renamed.append(_rename(folder, INCOMPLETE, f"is not complete, {reason}"))
    return renamed


def supersede(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, where a run begins again: they are not of its past. Nothing is deleted.

    A later start would else go on from one of them, and `rotate` take the new ones for the oldest. For one process.
    Returns the new names.
    """
    later = [folder for folder in _checkpoints(run_dir) if _step(folder) > step]
    return [_rename(folder, SUPERSEDED, f"is not of the run that begins at step {step}") for folder in later]


def _rename(folder: Path, prefix: str, reason: str) -> Path:
    target, number = folder.with_name(f"{prefix}-{folder.name}"), 0
    while target.exists() or target.is_symlink():
        number += 1
        target = folder.with_name(f"{prefix}-{folder.name}-{number}")
    folder.rename(target)
    logger.warning("%s %s: renamed to %s", folder.name, reason, target.name)
    return target


def rotate(run_dir: Path, limit: int | None, keep: Collection[Path] = ()) -> list[Path]:
    """Delete all complete checkpoints but the newest `limit` of them; incomplete ones neither count nor go.

    Args:
        run_dir: of the checkpoints.
        limit: how many stay; None or 0: all.
        keep: these stay anyway and do not count: the best one. So do links, which lead to another run's.

    Returns:
        The deleted ones. One that cannot be deleted is a warning: the run can go on.
    """
    if not limit:
        return []
    kept = {folder.resolve() for folder in keep}
    own = [folder for folder in _checkpoints(run_dir) if folder.resolve() not in kept and not folder.is_symlink()]
    complete = [folder for folder in own if is_complete(folder)]
    deleted = []
    for folder in complete[:-limit]:
        try:
            unseal(folder)  # first of all: killed in the middle of this, it must not count as complete
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", folder.name, error)
        else:
            deleted.append(folder)
    return deleted


@contextmanager
def saving(folder: Path, remove: bool = True) -> Iterator[None]:
    """Around everything that writes a checkpoint, in every process that does; `seal` comes last in it.

    Args:
        folder: `checkpoint-N` in the run's folder. A complete one that is there already becomes incomplete first.
        remove: whether to delete the folder if it cannot be written. For one of the processes.

    Raises:
        CheckpointError: if it cannot be written.
    """
    if NAME.fullmatch(folder.name) is None:
        raise ValueError(f"{folder.name!r} is not the name of a checkpoint.")
    with writing(folder.parent, folder.name):
        unseal(folder)
        try:
            yield
        except BaseException as error:
            # Half a checkpoint is of no use, and on a full disk its space is what the log and the next try need.
            if remove and write_problem(error, folder.parent) is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def writing(run_dir: Path, what: str) -> Iterator[None]:
    """Around what writes into a run's folder: the disk's errors become one line that says how to go on.

    Raises:
        CheckpointError: if `what` cannot be written.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        if (reason := write_problem(error, run_dir)) is None:
            raise
        last = find_last(run_dir)
        state = (
            "there is no complete checkpoint yet" if last is None else f"the last complete checkpoint is {last.name}"
        )
        advice = "free space (or mend the folder) and run the same command again"
        raise CheckpointError(f"{what} could not be written: {reason}; {state}; {advice}.") from error


class StopSignal:
    """
    Listens to SIGTERM, the wish that a run saves and ends: `requested` says that it came.

    A second one ends the process at once. One within `REPEAT_SECONDS` does not count: where a whole job is signalled,
    its processes get one from outside and one more from their launcher.

    In a thread other than the main one nothing can listen, and SIGTERM does what it did.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0

    def __enter__(self) -> "StopSignal":
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:  # a handler that is not Python's is told as None, and cannot be set again
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def shield_data_worker() -> None:
    """In a data loader's worker: SIGTERM ends it only if its parent sends it.

    Launchers signal the workers too, and a run whose workers are gone cannot take the step to its last checkpoint.
    macOS and Windows do not tell who sends a signal: nothing changes there.
    """
    parent = parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start from here on inherit this
    threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler does: this thread cannot raise in the other
