"""Runs that are killed, stopped, or out of disk or numbers: what they leave, and that they go on exactly.

In the fast tests a run is a process forked from a server that has imported everything, but for one that is the real
command. In the slow ones all are.
"""

import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.helpers.training_runs import Run, Started, write_model, write_records

from fusion_hf.training.checkpoints import find_last, is_complete

STEPS, SAVE_STEPS = 12, 3  # of the short runs, as in their recipe
FILE_SIZE_LIMIT = 50_000  # bytes: enough for logs and configurations, not for weights
STEP_SECONDS, WRITE_SECONDS, START_SECONDS = 0.05, 0.1, 10.0  # about, on two cores
SEED = 20260301

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    folder = tmp_path_factory.mktemp("runs")
    model, data = write_model(folder / "model"), write_records(folder / "data")
    numbers = iter(range(1000))
    return lambda **keys: Run.make(folder / f"run-{next(numbers)}", model, data, **keys)


@pytest.fixture(scope="module")
def undisturbed(make_run: MakeRun) -> Run:
    run = make_run()
    run.finish()
    assert [entry["step"] for entry in run.log()] == [*range(1, STEPS + 1)]
    assert run.names() == {"checkpoint-9", "checkpoint-12"}
    return run


def assert_same(run: Run, undisturbed: Run) -> None:
    assert run.exact_log() == undisturbed.exact_log()
    assert run.weights() == undisturbed.weights()


def test_killed(make_run: MakeRun, undisturbed: Run):
    """The real command, killed at a random moment and given again."""
    run = make_run()
    generator = random.Random(SEED)
    step = generator.randrange(1, STEPS)
    started = run.start_command()
    started.wait_for(lambda: run.last_step() >= step)
    time.sleep(generator.uniform(0, STEP_SECONDS))
    assert started.kill()
    assert step <= run.last_step() < STEPS
    started = run.start_command()
    assert started.end() == 0, started.stderr()
    assert_same(run, undisturbed)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped(make_run: MakeRun, undisturbed: Run, workers: int):
    """SIGTERM to the process and its data workers, as launchers send it."""
    run = make_run(dataloader_num_workers=workers)
    started = run.start()
    started.wait_for(lambda: run.last_step() > SAVE_STEPS)
    started.signal(signal.SIGTERM)
    assert started.end() == 128 + signal.SIGTERM, started.stderr()
    reached = run.last_step()
    assert SAVE_STEPS < reached < STEPS
    assert find_last(run.output) == run.output / f"checkpoint-{reached}"
    assert "Traceback" not in started.stderr()
    assert started.stderr().splitlines()[-1].startswith("A signal stopped the run after a checkpoint was written")
    run.finish()
    assert_same(run, undisturbed)


def test_disk_is_full(make_run: MakeRun, undisturbed: Run):
    run = make_run()
    shutil.copytree(undisturbed.output / "checkpoint-9", run.output / "checkpoint-9")
    shutil.copyfile(undisturbed.output / "log.jsonl", run.output / "log.jsonl")
    started = run.start(file_size_limit=FILE_SIZE_LIMIT)
    assert started.end() == 2
    assert "Traceback" not in started.stderr()
    assert re.fullmatch(
        r"error: checkpoint-12 could not be written: .*\. The last complete checkpoint is checkpoint-9\. "
        r"Free some space \(or repair the folder\) and run the same command again\.",
        started.stderr().splitlines()[-1],
    )
    assert run.names() == {"checkpoint-9"}
    assert is_complete(run.output / "checkpoint-9")
    run.finish()
    assert_same(run, undisturbed)


def test_loss_is_no_number(make_run: MakeRun):
    """The first step, with a rate beyond all reason, is still finite; the second cannot be."""
    run = make_run(save_steps=1, learning_rate=1e30, lr_scheduler_type="constant", warmup_steps=0)
    started = run.start()
    assert started.end() == 2
    error = started.stderr().splitlines()[-1]
    assert re.match(r"error: Step 2: the loss is (nan|inf) .* Nothing was saved after step 1\.", error), error
    assert run.names() == {"checkpoint-1"}
    assert is_complete(run.output / "checkpoint-1")
    assert run.last_step() == 1


def test_finished_run_does_nothing(undisturbed: Run):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.output.rglob("*")}
    undisturbed.finish()
    assert {path: path.stat().st_mtime_ns for path in undisturbed.output.rglob("*")} == before


def test_begun_anew(make_run: MakeRun, undisturbed: Run):
    """Checkpoints of the run before neither count nor are taken for newer ones."""
    run = make_run()
    shutil.copytree(undisturbed.output / "checkpoint-9", run.output / "checkpoint-50")
    values = yaml.safe_load(run.recipe.read_text())
    run.recipe.write_text(yaml.safe_dump({**values, "resume_from_checkpoint": "none"}))
    run.finish()
    assert run.names() == {"checkpoint-9", "checkpoint-12", "superseded-checkpoint-50"}
    assert_same(run, undisturbed)


class Killer:
    """Kills a run at random moments, again and again; notes at which."""

    def __init__(self, run: Run, processes: int, seed: int):
        self.run, self.processes, self.random = run, processes, random.Random(seed)
        self.kills: list[str] = []

    def start_and_kill(self) -> bool:
        """False if the run ended before it was killed."""
        moment = self.random.choice([self.in_training, self.in_training, self.in_writing, self.in_writing, self.early])
        begin = time.monotonic()
        started = self.run.start_command(self.processes)
        moment(started)
        if not started.kill():
            assert started.end() == 0, started.stderr()
            return False
        state = f"{moment.__name__} after {time.monotonic() - begin:.1f} s, step {self.run.last_step()}"
        unfinished = [path.name for path in self.checkpoints() if not is_complete(path)]
        self.kills.append(f"{state}, unfinished: {unfinished}")
        return True

    def checkpoints(self) -> list[Path]:
        return [*self.run.output.glob("checkpoint-*")]

    def in_training(self, started: Started) -> None:
        """Up to some steps beyond the last checkpoint, and somewhere in a step."""
        last = find_last(self.run.output)
        step = (0 if last is None else int(last.name.rpartition("-")[2])) + self.random.randrange(1, SAVE_LATER + 2)
        before = self.inode()  # a run that goes on begins with a new log
        started.wait_for(lambda: self.inode() != before and self.run.last_step() >= step)
        time.sleep(self.random.uniform(0, STEP_SECONDS))

    def inode(self) -> int:
        log = self.run.output / "log.jsonl"
        return log.stat().st_ino if log.exists() else 0

    def in_writing(self, started: Started) -> None:
        """From the moment a checkpoint's folder appears: its writing takes less than the longest wait."""
        before = {path.name for path in self.checkpoints()}
        started.wait_for(lambda: bool({path.name for path in self.checkpoints()} - before))
        time.sleep(self.random.uniform(0, WRITE_SECONDS))

    def early(self, started: Started) -> None:
        """At some moment until training begins: on a fast machine the run would else be over before the kills are."""
        before, end = self.inode(), time.monotonic() + self.random.uniform(0, START_SECONDS)
        started.wait_for(lambda: self.inode() != before or time.monotonic() >= end)


SAVE_LATER = 7
LONG = {"max_steps": 300, "save_steps": SAVE_LATER, "save_total_limit": 2}


@pytest.fixture(scope="module")
def undisturbed_long(make_run: MakeRun) -> Run:
    run = make_run(**LONG)
    run.finish()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again(make_run: MakeRun, undisturbed_long: Run, workers: int):
    """With data workers too the run is the one without."""
    run = make_run(**LONG, dataloader_num_workers=workers)
    kill_to_the_end(run, kills=22, processes=1, seed=SEED + workers)
    assert_same(run, undisturbed_long)


@pytest.mark.slow
def test_several_processes_killed(make_run: MakeRun):
    undisturbed, run = make_run(**LONG), make_run(**LONG)
    started = undisturbed.start_command(processes=2)
    assert started.end() == 0, started.stderr()
    kill_to_the_end(run, kills=8, processes=2, seed=SEED)
    assert_same(run, undisturbed)


def kill_to_the_end(run: Run, kills: int, processes: int, seed: int) -> None:
    killer = Killer(run, processes, seed)
    for _ in range(kills):
        assert killer.start_and_kill(), f"ended too soon: {killer.kills}"
    # once more, where the finished model is being written
    started = run.start_command(processes)
    started.wait_for(lambda: (run.output / "model.safetensors").exists())
    killer.kills.append(f"at the end: {started.kill()}")
    assert started.end() == 0 or run.start_command(processes).end() == 0
    sys.stdout.write("\n".join(killer.kills) + "\n")  # shown when the test fails, or with -s
    unfinished = [kill for kill in killer.kills if "unfinished: ['" in kill]
    assert len(unfinished) >= kills // 8, "too few kills hit a checkpoint being written"
