"""Runs of the command on easy-vqa's first questions, in real processes, and what they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_hf.inference import nano_path

ROOT = Path(__file__).parents[2]
SECONDS = 600  # a hung process fails its test
LIMIT = 130  # three windows, so that each of two processes has one
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / "accelerate" / "ddp.yaml"]
ACCELERATE += ["--num_processes", "2", "--main_process_port", "0"]
LAUNCHERS = [TORCHRUN, ACCELERATE]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(output: Path, *options: object, launcher: Sequence[object] = (), **variables: str) -> subprocess.Popen:
    arguments = ["-m", "fusion_hf", "evaluate", "--tasks", "easy_vqa", "--limit", LIMIT, "--output", output, *options]
    return subprocess.Popen(
        [sys.executable, *map(str, (*launcher, *arguments))],
        env={**ENVIRONMENT, **variables},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finish(output: Path, *options: object, **others: Any) -> dict[str, Any]:
    """The record of a run that must succeed."""
    process = start(output, *options, **others)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return record_of(output)


def record_of(output: Path) -> dict[str, Any]:
    return json.loads(max(output.glob("record-*.json")).read_text())


def entries(output: Path) -> list[dict[str, Any]]:
    """The answers on disk; a line being written is left out."""
    paths = sorted((output / "answers").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().split("\n")[:-1]]


def answers(output: Path) -> dict[str, str]:
    return {entry["key"]: entry["answer"] for entry in entries(output)}


def by_question(output: Path) -> dict[int, str]:
    """The answers; their keys are others than those of a model in the run's own process."""
    return {entry["doc_id"]: entry["answer"] for entry in entries(output)}


def figures(record: dict[str, Any]) -> list[tuple[str, int, Any]]:
    return [(task["status"], task["n"], task["metrics"]) for task in record["tasks"]]


def run_lmms_eval(
    folder: Path, task: str, *options: str, model_args: str = f"pretrained={nano_path()}", **variables: str
) -> dict[str, Any]:
    """The results of a task in `folder`, from lmms-eval's own command."""
    arguments = [
        "--model",
        "fusion",
        "--model_args",
        model_args,
        "--batch_size",
        "8",
        "--tasks",
        task,
    ]
    arguments += ["--include_path", str(folder), "--limit", "20", "--output_path", str(folder / "output"), *options]
    process = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments],
        env={**ENVIRONMENT, **variables},
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    paths = list((folder / "output").rglob("*results.json"))
    assert paths, process.stdout + process.stderr
    return json.loads(paths[0].read_text())["results"][task]
