"""From own images to the Hub, by commands alone: a recipe, a training, a merged model, a push to a stand-in."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tests.helpers.hub_server import HubServer, own_environment
from tests.train.conftest import make_records

SECONDS = 600  # a hung process fails its test
TERMINAL_SIZE = (24, 100)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
OF_THE_RUN = ("recipe.yaml", "log.jsonl", "training_args.bin", "trainer_state.json", "finished.json", "skipped.jsonl")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """As a user's, whose Hub is the stand-in."""
    return own_environment(hub, tmp_path / "home")


def fusion_hf(
    folder: Path, environment: dict[str, str], *arguments: str, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command with both streams in pipes, where nothing may move a cursor that is not there."""
    command = [sys.executable, "-m", "fusion_hf", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS, check=False)
    out, errors = done.stdout.decode(), done.stderr.decode()  # a text stream would hide carriage returns
    assert done.returncode == status, errors
    for text in (out, errors):
        assert CONTROL.search(text) is None, repr(text)
    return subprocess.CompletedProcess(command, status, out, errors)


@pytest.mark.slow
def test_full_fine_tuning(tmp_path: Path, environment: dict[str, str], hub: HubServer) -> None:
    """The recipe runs as it is, goes on where it was stopped, and its folder is pushed as it is."""
    make_records(tmp_path / "data", 12)
    (tmp_path / "data" / "pictures" / "1.png").write_bytes(b"no image")
    fusion_hf(tmp_path, environment, "init-recipe", "data/records.json", "--method", "full")
    failed = fusion_hf(tmp_path, environment, "train", "recipe.yaml", status=2)
    assert "on_broken to skip" in failed.stderr

    skip = ["train", "recipe.yaml", "on_broken=skip", "resume_from_checkpoint=none"]
    started = fusion_hf(tmp_path, environment, *skip).stderr
    assert "Records: 11, 4 per step" in started and "Steps: 3 per epoch, 30 in total" in started
    assert "Held-out records in records: 1, evaluation strategy: steps" in started
    assert "Trained parameters: vision_tower 470,688, projectors 75,200" in started
    assert "Output in runs/records-full: checkpoints every 6 steps" in started
    assert (
        "1 broken records were skipped. They are listed with the reasons in runs/records-full/skipped.jsonl" in started
    )
    run = tmp_path / "runs" / "records-full"
    for name in ("finished.json", "README.md", "model.safetensors"):
        (run / name).unlink()
    again = fusion_hf(tmp_path, environment, "train", "recipe.yaml", "on_broken=skip").stderr
    assert "Resuming from runs/records-full/checkpoint-30" in again

    pushed = fusion_hf(tmp_path, environment, "push", "--model", "runs/records-full", "--repo-id", "me/mine")
    files = hub.state.repositories["me/mine"]
    assert pushed.stderr == "" and hub.state.tags == {}
    assert "model.safetensors" in files and not files.keys() & set(OF_THE_RUN)
    assert not any("checkpoint" in name for name in files)
    card = ModelCard(files["README.md"].decode())
    assert 'model_id = "me/mine"' in card.text and "| 30 |" in card.text
    assert "1 broken records were left out" in card.text


@pytest.mark.slow
def test_lora_merged_and_published(tmp_path: Path, environment: dict[str, str], hub: HubServer) -> None:
    make_records(tmp_path / "data", 12)
    fusion_hf(tmp_path, environment, "init-recipe", "data/records.json")
    started = fusion_hf(tmp_path, environment, "train", "recipe.yaml", "max_steps=6").stderr
    assert "No record was skipped" in started
    refused = fusion_hf(
        tmp_path, environment, "push", "--model", "runs/records-lora", "--repo-id", "me/mine", "--dry-run", status=2
    )
    assert "fusion-hf merge --model runs/records-lora --output NEW_DIR" in refused.stderr

    merged = fusion_hf(tmp_path, environment, "merge", "--model", "runs/records-lora", "--output", "merged")
    assert merged.stderr == ""
    assert re.fullmatch(
        r"Merged runs/records-lora with its base \S+fusion-nano, as float32\. "
        r"Wrote merged: model\.safetensors \(6\.4 MB\), \d+ other files; 6\.\d MB in all\.\n",
        merged.stdout,
    )
    assert "Unloading and merging" in merge_in_a_terminal(tmp_path, environment)

    fusion_hf(tmp_path, environment, "push", "--model", "merged", "--repo-id", "me/mine", "--tag", "v1")
    card = ModelCard(hub.state.repositories["me/mine"]["README.md"].decode())
    assert "lora" in card.data.tags and card.data.license == "apache-2.0"
    assert "lora_rank: 16" in card.text and "11 records, 6 optimizer steps" in card.text
    assert set(hub.state.tags["me/mine"]) == {"v1"}


def merge_in_a_terminal(folder: Path, environment: dict[str, str]) -> str:
    """What `merge` writes on a standard error that is a terminal."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", *TERMINAL_SIZE, 0, 0))  # bars are as wide as it is
    command = [sys.executable, "-m", "fusion_hf", "merge", "--model", "runs/records-lora", "--output", "merged-again"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    seen = b""
    while True:
        try:
            piece = os.read(terminal, 2**16)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        seen += piece
    process.communicate(timeout=SECONDS)
    os.close(terminal)
    assert process.returncode == 0, seen
    return seen.decode()
