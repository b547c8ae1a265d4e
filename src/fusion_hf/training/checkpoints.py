"""Which checkpoints of a run are complete, and how a run is asked to save one and stop.

A checkpoint is a folder of many files that several processes write, and a run can be killed at any moment. The last
file to be written is therefore a manifest, `complete.json`, with the name and size of every file. A run never resumes
from a folder that has no manifest or does not match it.
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
MAX_MANIFEST_BYTES = 2**24  # about 100,000 files
REPEAT_SECONDS = 10.0
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
INCOMPLETE, SUPERSEDED = "incomplete", "superseded"


class CheckpointError(InputError):
    """A file of a run could not be written. The message names the last complete checkpoint."""


def seal(folder: Path) -> None:
    """
    Mark a checkpoint as complete by writing its manifest.

    Call this in the main process, after all processes have written their files. All files are flushed to disk before
    the manifest is written, so that a power failure cannot leave a manifest without its files.

    Args:
        folder: the checkpoint.
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
    """
    Mark a checkpoint as incomplete. Call this before anything in it changes.

    Args:
        folder: the checkpoint.
    """
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink(missing_ok=True)  # another process may have removed it already
        sync(folder)


def problem(folder: Path) -> str | None:
    """
    Say why a checkpoint is incomplete.

    Args:
        folder: the checkpoint.

    Returns:
        A short reason, or None if the checkpoint is complete.
    """
    manifest = folder / MANIFEST
    try:
        found = manifest.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MANIFEST_BYTES:
            return f"its {MANIFEST} is not a file of at most {MAX_MANIFEST_BYTES} bytes"
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to the end"
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
    """
    Check one entry of a manifest. `name` and `size` come from a file, so `name` may be any text and `size` any
    JSON value.
    """
    shown = repr(name[:LONGEST_NAME])
    path = PureWindowsPath(name)  # also knows drives and backslashes
    if path.anchor or ".." in path.parts or "\\" in name:
        return f"its {MANIFEST} names {shown}, which lies outside the folder"
    try:
        found = (folder / PurePosixPath(name)).stat()
    except FileNotFoundError:
        return f"{shown} is missing"
    except (OSError, ValueError) as error:  # ValueError: a null byte or a lone surrogate
        return f"{shown} cannot be read ({type(error).__name__})"
    if not stat.S_ISREG(found.st_mode):
        return f"{shown} is not a file"
    return None if found.st_size == size else f"the size of {shown} differs from the one in {MANIFEST}"


def is_complete(folder: Path) -> bool:
    """Return whether a checkpoint has a manifest that matches the sizes of its files."""
    return problem(folder) is None


def find_last(run_dir: Path) -> Path | None:
    """
    Find the complete checkpoint with the highest step.

    Args:
        run_dir: the `output_dir` of the run.

    Returns:
        Its folder, or None if there is no complete checkpoint.
    """
    return next((folder for folder in reversed(_checkpoints(run_dir)) if is_complete(folder)), None)


def _checkpoints(run_dir: Path) -> list[Path]:
    """List all checkpoints, complete or not, sorted by step."""
    if not run_dir.is_dir():
        return []
    named = [path for path in run_dir.iterdir() if NAME.fullmatch(path.name) is not None and path.is_dir()]
    return sorted(named, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def set_aside(run_dir: Path) -> list[Path]:
    """
    Rename incomplete checkpoints, so that no run resumes from them or writes into them. Nothing is deleted.

    Call this in one process, before any process looks for the last checkpoint.

    Args:
        run_dir: the `output_dir` of the run.

    Returns:
        The new paths.
    """
    renamed = []
    for folder in _checkpoints(run_dir):
        if (reason := problem(folder)) is not None:
            renamed.append(_rename(folder, INCOMPLETE, f"is incomplete ({reason})"))
    return renamed


def supersede(run_dir: Path, step: int) -> list[Path]:
    """
    Rename the checkpoints after `step`, because the run starts again from there. Nothing is deleted.

    Otherwise a later start would resume from one of them, and `rotate` would delete the new checkpoints first. Call
    this in one process.

    Args:
        run_dir: the `output_dir` of the run.
        step: the step that the run starts from.

    Returns:
        The new paths.
    """
    later = [folder for folder in _checkpoints(run_dir) if _step(folder) > step]
    return [_rename(folder, SUPERSEDED, f"is newer than step {step}, where this run starts") for folder in later]


def _rename(folder: Path, prefix: str, reason: str) -> Path:
    target, number = folder.with_name(f"{prefix}-{folder.name}"), 0
    while target.exists() or target.is_symlink():
        number += 1
        target = folder.with_name(f"{prefix}-{folder.name}-{number}")
    folder.rename(target)
    logger.warning("%s %s. It was renamed to %s.", folder.name, reason, target.name)
    return target


def rotate(run_dir: Path, limit: int | None, keep: Collection[Path] = ()) -> list[Path]:
    """
    Delete all complete checkpoints except the newest `limit` ones. Incomplete ones are neither counted nor deleted.

    A checkpoint that cannot be deleted causes a warning, and the run continues.

    Args:
        run_dir: the `output_dir` of the run.
        limit: how many checkpoints to keep. None or 0 keeps all.
        keep: checkpoints to keep in any case, such as the best one. They do not count. Symbolic links are also kept.

    Returns:
        The deleted checkpoints.
    """
    if not limit:
        return []
    kept = {folder.resolve() for folder in keep}
    own = [folder for folder in _checkpoints(run_dir) if folder.resolve() not in kept and not folder.is_symlink()]
    complete = [folder for folder in own if is_complete(folder)]
    deleted = []
    for folder in complete[:-limit]:
        try:
            unseal(folder)  # comes first, so that a partly deleted checkpoint never counts as complete
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("The checkpoint %s could not be deleted: %s", folder.name, error)
        else:
            deleted.append(folder)
    return deleted


@contextmanager
def saving(folder: Path, remove: bool = True) -> Iterator[None]:
    """
    Guard the code that writes a checkpoint. Use this in every process that writes, and call `seal` last inside it.

    Args:
        folder: `checkpoint-N` in the folder of the run. If it is complete already, it becomes incomplete first.
        remove: whether to delete the folder if it cannot be written. Only one process may do so.

    Raises:
        CheckpointError: if the checkpoint cannot be written.
    """
    if NAME.fullmatch(folder.name) is None:
        raise ValueError(f"The name of a checkpoint must be `checkpoint-N`, got {folder.name!r}.")
    with writing(folder.parent, folder.name):
        unseal(folder)
        try:
            yield
        except BaseException as error:
            # An incomplete checkpoint is useless, and on a full disk the log and the next attempt need its space.
            if remove and write_problem(error, folder.parent) is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def writing(run_dir: Path, what: str) -> Iterator[None]:
    """
    Guard the code that writes into the folder of a run, and turn disk errors into one line that says how to
    continue.

    Args:
        run_dir: the `output_dir` of the run.
        what: what is written, as the subject of the error message.

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
            "There is no complete checkpoint yet" if last is None else f"The last complete checkpoint is {last.name}"
        )
        advice = "Free some space (or repair the folder) and run the same command again"
        raise CheckpointError(f"{what} could not be written: {reason}. {state}. {advice}.") from error


class StopSignal:
    """
    Listen for SIGTERM, which asks a run to save a checkpoint and stop. `requested` says whether it has arrived.

    A second SIGTERM ends the process at once. Repeated signals within `REPEAT_SECONDS` count once, because the
    processes of a job may get one from the scheduler and one from their launcher.

    Python handles signals in the main thread only. In other threads this class does nothing, and SIGTERM keeps its
    effect.
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
        if self._listens:  # a handler that was not set by Python is None, and cannot be restored
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def shield_data_worker() -> None:
    """
    Let SIGTERM end a data loader's worker only if its parent process sends it.

    Launchers signal the workers too, and a run without workers could not reach the step of its last checkpoint. macOS
    and Windows do not report the sender of a signal, so this changes nothing there.
    """
    parent = parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited by all threads started from here on
    threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's handler does, since this thread cannot raise in the main thread
