"""The real command, killed at random moments and given again: no answer is lost, none is there twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers.forked import run_forked
from tests.helpers.questions import write_questions

COUNT, BATCH_SIZE = 200, 4
KILLS = 20
START_SECONDS, BATCH_SECONDS, END_SECONDS = 5.0, 0.1, 0.02  # about, on two cores
SECONDS = 300  # a hung process fails its test
POLL_SECONDS = 0.001
SEED = 20260401
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Asking:
    """A run of the command, which may be killed."""

    def __init__(self, questions: Path, output: Path):
        self.output, self.partial = output, output.with_name(f"{output.name}.partial")
        settings = ["--batch-size", BATCH_SIZE, "--max-new-tokens", 16, "--query-len", 4]
        self.arguments = ["ask", "--input", questions, "--output", output, *settings]
        self.command = [sys.executable, "-m", "fusion_hf", *map(str, self.arguments)]

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
        )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not happened() and self.process.poll() is None:
            assert time.monotonic() < end, "nothing happens"
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.end() == -signal.SIGKILL, "the run was over before it was killed"

    def end(self) -> int:
        _, self.errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode

    def finish(self) -> None:
        done = run_forked(self.arguments)
        assert done.returncode == 0, done.stderr

    def log(self) -> bytes:
        """Its whole lines."""
        content = self.partial.read_bytes() if self.partial.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def batches(self) -> int:
        return max(self.log().count(b"\n") - 1, 0)


def check_answers(asking: Asking, undisturbed: Asking, count: int) -> None:
    ids = [json.loads(line)["id"] for line in asking.output.read_text().splitlines()]
    assert ids == [f"record-{number}" for number in range(count)]
    assert asking.output.read_bytes() == undisturbed.output.read_bytes()
    assert [path.name for path in asking.output.parent.iterdir()] == [asking.output.name]


def make(tmp_path: Path, count: int) -> tuple[Asking, Asking]:
    """A run to be killed, and one that was not."""
    questions, _ = write_questions(tmp_path / "data", count)
    runs = []
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
        runs.append(Asking(questions, tmp_path / name / "answers.jsonl"))
    runs[1].finish()
    return runs[0], runs[1]


def test_killed(tmp_path: Path):
    asking, undisturbed = make(tmp_path, COUNT // 4)
    kept = b""
    for batches in (3, 6):  # each time the real command; what has to end does so in a forked one
        asking.start()
        asking.wait_for(lambda batches=batches: asking.batches() >= batches)
        asking.kill()
        assert asking.log().startswith(kept)  # what was answered stays, byte for byte
        assert not asking.output.exists()
        kept = asking.log()
    asking.finish()
    check_answers(asking, undisturbed, COUNT // 4)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path):
    asking, undisturbed = make(tmp_path, COUNT)
    generator = random.Random(SEED)
    kills, kept = [], b""
    for number in range(KILLS):
        asking.start()
        before = asking.batches()
        if generator.random() < 0.25:  # anywhere from the start of the interpreter
            end = time.monotonic() + generator.uniform(0, START_SECONDS)
            asking.wait_for(lambda end=end, before=before: time.monotonic() >= end or asking.batches() > before)
        else:  # some batches later, and somewhere in the next one
            more = generator.randrange(1, 3)
            asking.wait_for(lambda more=more, before=before: asking.batches() >= before + more)
            time.sleep(generator.uniform(0, BATCH_SECONDS))
        asking.kill()
        kills.append(f"kill {number} after {asking.batches()} batches")
        assert not asking.output.exists(), kills
        assert asking.log().startswith(kept), kills  # what was answered stays, byte for byte
        kept = asking.log()
    assert len(set(kills)) == KILLS and asking.batches() >= KILLS // 2, kills
    asking.finish()
    check_answers(asking, undisturbed, COUNT)


@pytest.mark.slow
def test_killed_while_the_output_is_made(tmp_path: Path):
    """From the moment the last batch is on the disk until the process is over."""
    asking, undisturbed = make(tmp_path, 8)
    generator = random.Random(SEED)
    states = []
    for _ in range(KILLS // 2):
        asking.start()
        asking.wait_for(lambda: asking.batches() == 2 or asking.output.exists())
        time.sleep(generator.uniform(0, END_SECONDS))
        asking.process.send_signal(signal.SIGKILL)
        asking.end()
        states.append((asking.output.exists(), asking.partial.exists()))
        if asking.partial.exists():
            asking.finish()
        for path in asking.output.parent.glob("*.lock"):  # of a process that was killed after the removal of the log
            path.unlink()
        check_answers(asking, undisturbed, 8)
        asking.output.unlink()
    sys.stdout.write(f"{states}\n")  # shown when the test fails, or with -s
