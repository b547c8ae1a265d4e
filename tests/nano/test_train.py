"""`make nano`, with next to no steps: real processes, every stage, and what is finished is not done again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.nano import records as nano_records
from fusion_hf.nano.evaluate import accuracies
from fusion_hf.nano.records import Record
from fusion_hf.nano.report import most_frequent_answers, shuffled
from fusion_hf.nano.train import GROUNDING, PLAN


def train(output: Path) -> str:
    arguments = ["-m", "fusion_hf.nano.train", "--output", str(output), "--steps-scale", "0.0003"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.slow
def test_all_stages_and_resuming(tmp_path: Path) -> None:
    first = train(tmp_path)
    assert all(f"{plan.name} done after" in first for plan in (GROUNDING, *PLAN))
    assert all(f"validation after {plan.name}" in first for plan in PLAN)
    model = FusionForConditionalGeneration.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.num_parameters() <= 6_000_000
    assert json.loads((tmp_path / "config.json").read_text()).get("use_cache", True)
    assert FusionProcessor.from_pretrained(tmp_path).query_len == model.config.query_len
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    second = train(tmp_path)
    assert all(f"{plan.name} is finished" in second for plan in (GROUNDING, *PLAN))
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_accuracies() -> None:
    records = [
        Record(Path("a"), ((question, answer),), "easy-vqa", "a") for question, answer in [("a", "yes"), ("b", "red")]
    ]
    assert accuracies(records, ["yes", "blue"]) == {
        "easy-vqa": 0.5,
        "easy-vqa not yes/no": 0.0,
        "easy-vqa yes/no": 1.0,
    }


def test_question_only_baseline_and_shuffled_pictures() -> None:
    """The figures that easy-vqa's questions alone allow, computed from the data set."""
    records = [record for record in nano_records.test_records(drawn=1) if record.category == "easy-vqa"]
    assert len(records) == 9673
    scores = accuracies(records, most_frequent_answers(records))
    assert scores["easy-vqa"] == pytest.approx(0.670, abs=0.002)
    assert scores["easy-vqa not yes/no"] == pytest.approx(0.233, abs=0.002)
    assert all(other.key != record.key for record, other in zip(records, shuffled(records), strict=True))
