"""The real command, killed at random moments and given again: no record is lost, none is there twice."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tests.helpers.openai_server import Scripted
from tests.synthesis.runs import all_bytes, check_complete

RECORDS, CONCURRENCY = 60, 4
KILLS = 20
SECONDS = 300  # a hung process fails its test
ANSWER_SECONDS = 0.08  # of the server
SEED = 20260401
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(config: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fusion_hf", "synthesize", str(config)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)


def finish(config: Path) -> None:
    process = start(config)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors


def kill(process: "subprocess.Popen[str]") -> bool:
    """Kill the command and the processes of its tasks; whether it was still running."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    return running


def check_images(folder: Path) -> None:
    """What has a name is whole."""
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.load()


def run_killed(config: Path, images: Path, sign: Callable[[], int], moments: list[float]) -> None:
    """Start and kill at each moment, in seconds after `sign` has changed in that start."""
    for number, moment in enumerate(moments):
        before = sign()
        process = start(config)
        end = time.monotonic() + SECONDS
        while sign() == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(moment)
        assert kill(process), f"the run was over before kill {number}"
        check_images(images)


def check_requests(server: Scripted, kills: int) -> None:
    """Each kill repeats at most the requests in flight."""
    repeated = sum(count - 1 for count in server.repeats.values())
    assert repeated <= kills * CONCURRENCY, f"{repeated} requests were repeated after {kills} kills"


def test_killed(server: Scripted, make_config, tmp_path: Path):
    server.seconds = ANSWER_SECONDS
    images = {"kind": "openai", "model": "painter", "url": server.url, "width": 32, "height": 32}
    config = make_config(server, "killed", 12, executor__tasks=1, writer__concurrency=CONCURRENCY, images=images)
    run_killed(config, tmp_path / "killed" / "work" / "pictures", lambda: len(server.requests), [0.2])
    finish(config)
    check_complete(tmp_path / "killed" / "data", 12)
    check_requests(server, 1)


@pytest.mark.slow
def test_killed_again_and_again(server: Scripted, make_config, tmp_path: Path):
    settings = {"writer__concurrency": CONCURRENCY, "executor__tasks": 1, "images__steps": 20, "images__batch_size": 2}
    undisturbed = make_config(server, "undisturbed", RECORDS, **settings)
    finish(undisturbed)
    server.repeats.clear()
    config, images = make_config(server, "killed", RECORDS, **settings), tmp_path / "killed" / "work" / "pictures"
    generator = random.Random(SEED)
    moments = [generator.uniform(0, 0.3) for _ in range(KILLS)]
    server.seconds = ANSWER_SECONDS
    run_killed(config, images, lambda: len(server.requests), moments[: KILLS // 2])
    assert not images.exists()
    server.seconds = 0
    run_killed(config, images, lambda: len(list(images.rglob("*.png"))), moments[KILLS // 2 :])
    finish(config)
    check_complete(tmp_path / "killed" / "data", RECORDS)
    check_requests(server, KILLS)
    assert all_bytes(tmp_path / "killed" / "data") == all_bytes(tmp_path / "undisturbed" / "data")
    assert all_bytes(images) == all_bytes(tmp_path / "undisturbed" / "work" / "pictures")
