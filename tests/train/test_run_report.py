"""A run says what it is going to do, from which checkpoint it goes on, and what it has left out."""

import json
import logging
from pathlib import Path

import pytest
from tests.helpers.training_runs import Run, write_model, write_records

from fusion_hf.training.recipe import load_recipe
from fusion_hf.training.run import run as train

KEYS = {"max_steps": 2, "save_steps": 1, "save_total_limit": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "data", 9)


def messages(run: Run, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fusion_hf.training"):
        assert train(load_recipe(run.recipe))
    return [record.getMessage() for record in caplog.records]


def test_what_is_said(model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {**KEYS, "train": ["projectors", "samplers"], "eval_data": str(data), "eval_strategy": "epoch"}
    run = Run.make(tmp_path / "run", model, data, **keys)
    said = messages(run, caplog)
    expected = (
        "Records: 9, 4 per step (2 at a time, 2 times, in 1 processes)",
        "Steps: 3 per epoch, 2 in total",
        "Held-out records in records: 9, evaluation strategy: epoch",
        f"Output in {run.output}: checkpoints every 1 steps, metrics in log.jsonl",
        "No record was skipped.",
    )
    assert [line for line in said if line in expected] == list(expected)
    (trained,) = (line for line in said if line.startswith("Trained parameters: projectors"))
    assert "samplers" in trained and "vision_tower" not in trained and "language_model" not in trained
    assert not any(line.startswith("Resuming from") for line in said)

    (run.output / "finished.json").unlink()
    assert f"Resuming from {run.output / 'checkpoint-2'}" in messages(run, caplog)


def test_what_was_skipped(model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = json.loads(data.read_text())
    records[0]["conversations"] = []
    data.write_text(json.dumps(records))
    run = Run.make(tmp_path / "run", model, data, **KEYS, on_broken="skip")
    said = messages(run, caplog)
    assert "Records: 8, 4 per step (2 at a time, 2 times, in 1 processes)" in said
    assert (
        f"1 broken records were skipped. They are listed with the reasons in {run.output / 'skipped.jsonl'}." in said
    )
    assert json.loads((run.output / "finished.json").read_text()) == {
        "steps": 2,
        "records": 8,
        "skipped": 1,
        "best_step": None,
    }


def test_a_stream_has_no_length(model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = messages(Run.make(tmp_path / "run", model, data, **KEYS, streaming=True), caplog)
    assert any(line.startswith("Records: a stream of unknown length, 4 per step") for line in said)
    assert "Steps: 2 in total" in said


def test_a_finished_run_gets_the_card_that_it_lacks(model: Path, data: Path, tmp_path: Path) -> None:
    """An older version wrote none."""
    run = Run.make(tmp_path / "run", model, data, **KEYS)
    assert train(load_recipe(run.recipe))
    card = (run.output / "README.md").read_text()
    (run.output / "README.md").unlink()
    assert train(load_recipe(run.recipe))
    assert (run.output / "README.md").read_text() == card


def test_the_token_is_not_written_down(model: Path, data: Path, tmp_path: Path) -> None:
    run = Run.make(tmp_path / "run", model, data, **KEYS, hub_token="hf_secret")
    assert train(load_recipe(run.recipe))
    for path in run.output.glob("*.*"):
        if path.suffix in (".yaml", ".json", ".jsonl", ".md"):
            assert "hf_secret" not in path.read_text(), path
