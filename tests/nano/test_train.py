"""`make nano`, with next to no steps, in real processes; and how its answers are counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.nano import training_records as nano_records
from fusion_hf.nano.evaluate import accuracies
from fusion_hf.nano.report import STAGES, most_frequent_answers, shuffled
from fusion_hf.nano.training_records import NanoRecord

RECIPES = Path(__file__).parents[2] / "configs" / "recipes" / "fusion-nano"


def run(*arguments: str, processes: int = 1) -> None:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_steps_of_make_nano(tmp_path: Path) -> None:
    """With few images and next to no steps; the recipes are the ones that `make nano` uses."""
    run("fusion_hf.nano.prepare", str(tmp_path), "--share", "0.01")
    run("fusion_hf.nano.start", str(tmp_path), "--steps", "2", processes=2)
    before = "start"
    for stage in STAGES:
        overrides = [
            *(f"model={tmp_path / before}", f"output_dir={tmp_path / stage}"),
            *(f"data={tmp_path / 'data' / f'{stage}.json'}", f"eval_data={tmp_path / 'data' / 'validation.json'}"),
            *("max_steps=3", "eval_steps=3", "eval_samples=4"),
        ]
        run("fusion_hf", "train", str(RECIPES / f"{stage}.yaml"), *overrides, processes=2)
        before = stage
    folder = tmp_path / "stage2"
    model = FusionForConditionalGeneration.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.num_parameters() <= 6_000_000
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True)
    assert model.generation_config.eos_token_id is not None
    assert FusionProcessor.from_pretrained(folder).query_len == model.config.query_len
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any(entry.get("eval_answers") == 4 for entry in log)
    assert json.loads((folder / "finished.json").read_text())["steps"] == 3


def test_accuracies() -> None:
    records = [
        NanoRecord(Path("a"), ((question, answer),), "easy-vqa", "a")
        for question, answer in [("a", "yes"), ("b", "red")]
    ]
    assert accuracies(records, ["yes", "blue"]) == {
        "easy-vqa": 0.5,
        "easy-vqa not yes/no": 0.0,
        "easy-vqa yes/no": 1.0,
    }


def test_question_only_baseline_and_shuffled_images() -> None:
    """The figures that easy-vqa's questions alone allow, computed from the data set."""
    records = [record for record in nano_records.test_records(drawn=1) if record.category == "easy-vqa"]
    assert len(records) == 9673
    scores = accuracies(records, most_frequent_answers(records))
    assert scores["easy-vqa"] == pytest.approx(0.670, abs=0.002)
    assert scores["easy-vqa not yes/no"] == pytest.approx(0.233, abs=0.002)
    assert all(other.key != record.key for record, other in zip(records, shuffled(records), strict=True))
