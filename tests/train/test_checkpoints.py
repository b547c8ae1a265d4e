"""Complete and incomplete checkpoints, in real folders and processes; a whole training is killed in `test_kill.py`."""

import errno
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import DRAFT
from fusion_hf.training import checkpoints
from fusion_hf.training.checkpoints import (
    MANIFEST,
    CheckpointError,
    StopSignal,
    find_last,
    is_complete,
    problem,
    rotate,
    saving,
    seal,
    set_aside,
    shield_data_worker,
    supersede,
    writing,
)

FORK = multiprocessing.get_context("fork")  # a fresh process would take seconds to import torch
SECONDS = 30  # a hung process fails its test
MEGABYTE = 2**20
TENSORS = {"weight": torch.zeros(MEGABYTE)}  # 4 MB


def write(folder: Path, complete: bool = True) -> Path:
    (folder / "global_step").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "global_step" / "optimizer.pt").write_bytes(b"optimizer")
    if complete:
        seal(folder)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def in_child(do: Callable[[], object]) -> int | None:
    """Runs it in a forked process; its exit status, negative if a signal ended it."""
    child = FORK.Process(target=do)
    child.start()
    child.join(SECONDS)
    return child.exitcode


def killed_at(call: int, function: str, do: Callable[[], object]) -> int | None:
    """Runs it in a process that gets SIGKILL just before the given call of `os.<function>`."""

    def run() -> None:
        original, calls = getattr(os, function), 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return original(*arguments, **options)

        setattr(os, function, counted)
        do()

    return in_child(run)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sealed_is_complete(tmp_path: Path):
    folder = write(tmp_path / "checkpoint-5")
    assert problem(folder) is None
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest == {"format": 1, "files": {"trainer_state.json": 2, "global_step/optimizer.pt": 9}}
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "notes.txt").write_text("may be added")
    assert is_complete(moved)


def test_sealed_again_after_a_kill_between(tmp_path: Path):
    folder = write(tmp_path / "checkpoint-5", complete=False)
    (folder / f"{MANIFEST}{DRAFT}").write_text("{")
    seal(folder)
    assert is_complete(folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "no complete.json"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "'trainer_state.json' is missing"),
        (
            lambda folder: os.truncate(folder / "global_step" / "optimizer.pt", 8),
            "size of 'global_step/optimizer.pt' differs",
        ),
        (lambda folder: shutil.rmtree(folder / "global_step"), "'global_step/optimizer.pt' is missing"),
    ],
)
def test_damage_is_seen(tmp_path: Path, damage: Callable[[Path], object], reason: str):
    folder = write(tmp_path / "checkpoint-5")
    damage(folder)
    assert reason in str(problem(folder))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"),
        ('{"format": 1, "files": {"a', "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("1" * 10_000, "ValueError"),
        ("[]", "not of format 1"),
        ('{"files": {"trainer_state.json": 2}}', "not of format 1"),
        ('{"format": 2, "files": {"trainer_state.json": 2}}', "not of format 1"),
        ('{"format": 1, "files": {}}', "lists no files"),
        ('{"format": 1, "files": ["trainer_state.json"]}', "lists no files"),
        ('{"format": 1, "files": {"../secret": 6}}', "outside the folder"),
        ('{"format": 1, "files": {"global_step/../../secret": 6}}', "outside the folder"),
        ('{"format": 1, "files": {"/etc/hostname": 6}}', "outside the folder"),
        ('{"format": 1, "files": {"..\\\\secret": 6}}', "outside the folder"),
        ('{"format": 1, "files": {"C:secret": 6}}', "outside the folder"),
        ('{"format": 1, "files": {"": 4096}}', "not a file"),
        ('{"format": 1, "files": {"global_step": 4096}}', "not a file"),
        ('{"format": 1, "files": {"a\\u0000b": 1}}', "ValueError"),
        ('{"format": 1, "files": {"\\ud800": 1}}', "UnicodeEncodeError"),
        (f'{{"format": 1, "files": {{"{"n" * 5000}": 1}}}}', "OSError"),
        ('{"format": 1, "files": {"trainer_state.json": "2"}}', "the size of 'trainer_state.json' differs"),
        ('{"format": 1, "files": {"trainer_state.json": [[]]}}', "the size of 'trainer_state.json' differs"),
    ],
)
def test_hostile_manifest(tmp_path: Path, text: str, reason: str):
    (tmp_path / "secret").write_text("secret")
    folder = write(tmp_path / "checkpoint-5")
    (folder / MANIFEST).write_text(text)
    found = problem(folder)
    assert found is not None
    assert reason in found
    assert len(found) < 200


def test_manifest_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path / "checkpoint-5")
    monkeypatch.setattr(checkpoints, "MAX_MANIFEST_BYTES", 10)
    assert "not a file of at most 10 bytes" in str(problem(folder))
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to("/dev/zero")
    assert "not a file of at most" in str(problem(folder))


def test_last_is_of_the_highest_step(tmp_path: Path):
    assert find_last(tmp_path / "nothing") is None
    assert find_last(tmp_path) is None
    for step in (1000, 200, 90):  # neither the order of writing nor that of names
        write(tmp_path / f"checkpoint-{step}")
    write(tmp_path / "checkpoint-2000", complete=False)
    write(tmp_path / "checkpoint-3000-old")
    write(tmp_path / "my-checkpoint-4000")
    (tmp_path / "checkpoint-5000").write_text("a file")
    assert find_last(tmp_path) == tmp_path / "checkpoint-1000"


def test_incomplete_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write(tmp_path / "checkpoint-1")
    for attempt in range(3):
        unfinished = write(tmp_path / "checkpoint-2", complete=False)
        (unfinished / "attempt").write_text(str(attempt))
        with caplog.at_level(logging.WARNING):
            (renamed,) = set_aside(tmp_path)
        assert (renamed / "attempt").read_text() == str(attempt)
    assert names(tmp_path) == {
        "checkpoint-1",
        "incomplete-checkpoint-2",
        "incomplete-checkpoint-2-1",
        "incomplete-checkpoint-2-2",
    }
    assert "checkpoint-2 is incomplete (it has no complete.json" in caplog.text
    assert set_aside(tmp_path) == []
    assert set_aside(tmp_path / "nothing") == []


def test_later_ones_are_superseded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for step in (5, 9, 10, 100):
        write(tmp_path / f"checkpoint-{step}")
    assert supersede(tmp_path, 9) == [tmp_path / f"superseded-checkpoint-{step}" for step in (10, 100)]
    assert (
        "checkpoint-10 is newer than step 9, where this run starts. It was renamed to superseded-checkpoint-10"
        in caplog.text
    )
    assert find_last(tmp_path) == tmp_path / "checkpoint-9"
    write(tmp_path / "checkpoint-10")
    assert supersede(tmp_path, 0)[-1] == tmp_path / "superseded-checkpoint-10-1"
    assert find_last(tmp_path) is None
    assert supersede(tmp_path / "nothing", 0) == []


def test_rotation_counts_complete_ones(tmp_path: Path):
    for step in (8, 9, 10, 11):
        write(tmp_path / f"checkpoint-{step}", complete=step != 10)
    assert rotate(tmp_path, None) == rotate(tmp_path, 0) == rotate(tmp_path, 3) == []
    assert rotate(tmp_path, 2) == [tmp_path / "checkpoint-8"]
    assert names(tmp_path) == {"checkpoint-9", "checkpoint-10", "checkpoint-11"}
    assert rotate(tmp_path, 1, keep=[tmp_path / "checkpoint-9"]) == []
    assert rotate(tmp_path, 1) == [tmp_path / "checkpoint-9"]
    assert find_last(tmp_path) == tmp_path / "checkpoint-11"


def test_rotation_leaves_links(tmp_path: Path):
    (tmp_path / "run").mkdir()
    other = write(tmp_path / "other")
    (tmp_path / "run" / "checkpoint-1").symlink_to(other)
    write(tmp_path / "run" / "checkpoint-2")
    assert rotate(tmp_path / "run", 1) == []
    assert is_complete(other)


def test_rotation_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def busy(folder: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}")
    monkeypatch.setattr(shutil, "rmtree", busy)
    assert rotate(tmp_path, 1) == []
    assert "checkpoint-1 could not be deleted: [Errno 16] Device or resource busy" in caplog.text
    assert find_last(tmp_path) == tmp_path / "checkpoint-2"


def test_killed_while_sealing(tmp_path: Path):
    """Before every fsync of it: the checkpoint counts either not at all or is whole."""
    states = []
    for call in range(20):
        run = tmp_path / str(call)
        write(run / "checkpoint-1")
        unfinished = write(run / "checkpoint-2", complete=False)
        status = killed_at(call, "fsync", lambda folder=unfinished: seal(folder))
        assert status in (0, -signal.SIGKILL)
        states.append(is_complete(unfinished))
        set_aside(run)
        assert find_last(run) == run / ("checkpoint-2" if states[-1] else "checkpoint-1")
        if status == 0:
            break
    # two files, a folder in the folder, the folder, the draft; then the manifest is in its place, and twice its folder
    assert states == [False] * 5 + [True] * 3


def test_killed_while_rotating(tmp_path: Path):
    """Before every deletion of it: half a checkpoint never counts."""
    ended = 0
    for call in range(20):
        run = tmp_path / str(call)
        for step in (1, 2):
            write(run / f"checkpoint-{step}")
        status = killed_at(call, "unlink", lambda folder=run: rotate(folder, 1))
        assert status in (0, -signal.SIGKILL)
        assert find_last(run) == run / "checkpoint-2"
        whole = len([path for path in (run / "checkpoint-1").rglob("*") if path.is_file()]) == 3
        assert is_complete(run / "checkpoint-1") == whole
        ended += 1
        if status == 0:
            break
    assert ended in (3, 4)  # files deleted, and the end; Python 3.10 does not delete the manifest through `os.unlink`


def test_killed_while_overwriting(tmp_path: Path):
    """A run that begins again from an older checkpoint comes to the number of a complete one."""
    folder = write(tmp_path / "checkpoint-2")

    def overwrite() -> None:
        with saving(folder):
            (folder / "trainer_state.json").write_text("[]")  # as large as before
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(overwrite) == -signal.SIGKILL
    assert not is_complete(folder)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: (folder / "tokenizer.json").write_text("x" * 2 * MEGABYTE),
    "torch": lambda folder: torch.save(TENSORS, folder / "optimizer.pt"),
    "safetensors": lambda folder: save_file(TENSORS, folder / "model.safetensors"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_write_that_fails(tmp_path: Path, writer: str):
    write(tmp_path / "checkpoint-1")
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(CheckpointError) as raised, file_size_limit(MEGABYTE), saving(folder):
        folder.mkdir()
        WRITERS[writer](folder)
        seal(folder)
    message = str(raised.value)
    assert isinstance(raised.value, InputError)
    assert "\n" not in message
    assert message.startswith("checkpoint-2 could not be written: ")
    assert ("GB are free on that disk" if writer == "torch" else "File too large") in message
    assert "The last complete checkpoint is checkpoint-1. " in message and "run the same command again" in message
    assert names(tmp_path) == {"checkpoint-1"}
    with saving(folder):  # the same, with space
        folder.mkdir()
        WRITERS[writer](folder)
        seal(folder)
    assert find_last(tmp_path) == folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_disk_that_is_full(tmp_path: Path):
    folder = tmp_path / "checkpoint-2"
    for write_file in (lambda path: path.write_text("x"), lambda path: torch.save({}, path)):
        with pytest.raises(CheckpointError, match="There is no complete checkpoint yet") as raised, saving(folder):
            folder.mkdir()
            (folder / "file").symlink_to("/dev/full")
            write_file(folder / "file")
    assert "torch could not write" in str(raised.value)


def test_one_process_removes(tmp_path: Path):
    folder = write(tmp_path / "checkpoint-2", complete=False)
    with pytest.raises(CheckpointError, match="No space left on device"), saving(folder, remove=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert folder.is_dir()
    assert find_last(tmp_path) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        OSError("404 Client Error"),
        ValueError("inline_container"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: BaseException):
    folder = write(tmp_path / "checkpoint-2", complete=False)
    with pytest.raises(type(error)) as raised, saving(folder):
        raise error
    assert raised.value is error
    assert folder.is_dir()


def test_only_checkpoints_are_removed(tmp_path: Path):
    run = write(tmp_path / "run", complete=False)
    with pytest.raises(ValueError, match="must be `checkpoint-N`, got 'run'"), saving(run):
        pass
    with pytest.raises(CheckpointError, match="the model could not be written: disk"), writing(run, "the model"):
        raise OSError(errno.ENOSPC, "disk")
    assert run.is_dir()


def test_stop_signal():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        for _ in range(2):  # a launcher's comes after the job's
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_stop_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoints, "REPEAT_SECONDS", 0.05)

    def insist() -> None:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested
            time.sleep(0.1)
            signal.raise_signal(signal.SIGTERM)

    assert in_child(insist) == -signal.SIGTERM


def test_stop_signal_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def listen() -> None:
        with StopSignal() as stop:
            found.extend([stop.requested, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [False, before]


class Numbers(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


def read_with_signal(shielded: bool, report: Any) -> None:
    """Somebody signals this process' group in the middle of reading, as launchers do."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    init = (lambda worker: shield_data_worker()) if shielded else None
    read: list[int] = []
    with StopSignal() as stop:
        try:
            for batch in DataLoader(Numbers(), batch_size=2, num_workers=2, worker_init_fn=init):
                if len(read) == 10:
                    in_child(lambda: os.killpg(0, signal.SIGTERM))
                read.extend(batch.tolist())
        # How a worker's end shows depends on the moment: torch's own error, or a queue that breaks off in a batch.
        except (RuntimeError, OSError, EOFError) as error:
            report.put(f"{type(error).__name__}: {error}")
        else:
            report.put((read, stop.requested))


def test_data_workers_outlive_a_signal_to_the_group():
    report = FORK.SimpleQueue()
    assert in_child(lambda: read_with_signal(True, report)) == 0
    assert report.get() == (list(range(40)), True)
    assert in_child(lambda: read_with_signal(False, report)) == 0
    assert isinstance(report.get(), str)  # an error instead of the batches: what the shield is for


def test_data_worker_ends_with_its_parents_signal():
    ready = FORK.SimpleQueue()

    def work() -> None:
        shield_data_worker()
        ready.put(True)
        time.sleep(SECONDS)

    worker = FORK.Process(target=work)
    worker.start()
    ready.get()
    in_child(lambda: os.kill(worker.pid or 0, signal.SIGTERM))
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(SECONDS)
    assert worker.exitcode == 0
