"""The comparison with the authors' code: its table, what it refuses, and, with a checkout of theirs, all of it."""

import json
import os
import sys
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path

import authors
import pytest
from authors_report import ROWS, TABLE
from blocks import NOT_MEASURED, render
from our_side import OurSide

from fusion_hf import nano_path
from fusion_hf.training.collator import IGNORE_INDEX

STAND_IN = Path(__file__).parents[1] / "fixtures" / "authors_stand_in"
CODE, PYTHON = "FUSION_AUTHORS_CODE", "FUSION_AUTHORS_PYTHON"
VERSIONS = {"torch": "2", "transformers": "5"}


def cells_of(result):
    result = {"machine": {"device": "a CPU"}, "versions": VERSIONS, "settings": {"threads": 2}, **result}
    lines = render(TABLE, {"Intel": result | {"authors": {"versions": VERSIONS}}, "AMD": None}).splitlines()
    assert lines[-1].startswith("- Intel: a CPU, 2 threads")
    return {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in lines if line.startswith("| "))}


def test_ratios_are_taken_within_rounds():
    figures = {
        "first_token": {"theirs": [1.0, 4.0, 1.0], "ours": [0.5, 1.0, 0.7], "ours_bfloat16": [0.4, 1.2, 0.2]},
    }
    cells = cells_of({"tokens": figures, "training": {"step_allocated": {"theirs": [4 * 2**20], "ours": [2**20]}}})
    assert cells["first token, float32 / theirs"] == ["at most 0.6", "0.50 (0.25-0.70)", NOT_MEASURED]
    assert cells["first token, bfloat16 / theirs in float32"][1] == "0.30 (0.20-0.40)"
    assert cells["training step, memory above the weights"][1] == "0.25"
    assert cells["training step, memory above the weights: theirs"][1] == "4 MiB"
    assert sum(row[1] != NOT_MEASURED for row in cells.values()) == 6  # with the table's head


def test_rounds_are_added():
    former, new = {"step": {"ours": [1.0], "theirs": [2.0]}}, {"step": {"ours": [3.0], "theirs": [4.0]}}
    assert authors.add_rounds(former, new) == {"step": {"ours": [1.0, 3.0], "theirs": [2.0, 4.0]}}
    assert authors.add_rounds({}, new) == new


@pytest.mark.parametrize(
    ("code", "python", "named"),
    [("nowhere", sys.executable, "--authors-code"), (STAND_IN, "no-such-python", "--authors-python")],
)
def test_what_is_missing_is_named(code, python, named, capsys):
    with pytest.raises(SystemExit) as ended:
        authors.parse_arguments(["--authors-code", str(code), "--authors-python", python])
    assert ended.value.code == 2
    assert f"error: {named}" in capsys.readouterr().err


def test_a_process_that_ends_is_an_error(tmp_path):
    environment = authors.AuthorsEnvironment(STAND_IN, "false")
    (tmp_path / "config.json").write_text('{"query_len": 4, "image_token_id": 1, "latent_token_id": 2}')
    checkpoint = authors.Checkpoint(tmp_path, tmp_path, tmp_path)
    bench = authors.Bench(environment, tmp_path, {"nano": checkpoint}, "nano", threads=1, rounds=1)
    with pytest.raises(RuntimeError, match="'theirs' ended without an answer"):
        authors.Contestant(bench, "theirs")


@pytest.mark.parametrize(("theirs", "refused"), [([2.0, 1.0], False), ([2.0, 1.001], True), ([2.001, 1.0], True)])
def test_training_is_compared_by_the_losses_of_all_rounds(theirs, refused, tmp_path, monkeypatch):
    class Answers:
        def ask(self, do, **arguments):
            return {"step_allocated": 1}

    @contextmanager
    def contestants(bench, names):
        yield dict.fromkeys(names, Answers())

    rounds = defaultdict(dict, loss={"theirs": theirs, "ours": [2.0, 1.0]})
    monkeypatch.setattr(authors, "alternate", lambda *arguments, **options: (rounds, {}))
    monkeypatch.setattr(authors, "write_batch", lambda bench: tmp_path)
    monkeypatch.setattr(authors, "contestants", contestants)
    with pytest.raises(RuntimeError, match="losses must be equal") if refused else nullcontext():
        assert authors.measure_training(None)["step_allocated"] == {"theirs": [1], "ours": [1]}


def test_our_side_reads_a_training_batch(tmp_path):
    nano = Path(nano_path())
    bench = authors.Bench(None, tmp_path, {"nano": authors.Checkpoint(nano, nano, nano)}, "nano", threads=1, rounds=1)
    side = OurSide({"folder": str(nano), "dtype": "float32"})
    batch = side.read_batch(str(authors.write_batch(bench)))
    assert batch.keys() <= signature(side.model.forward).parameters.keys()
    assert (batch["labels"].flatten()[batch["loss_positions"] + 1] != IGNORE_INDEX).all()
    assert len(batch["loss_positions"]) == (batch["labels"] != IGNORE_INDEX).sum() > 0


@pytest.mark.slow
@pytest.mark.skipif(
    CODE not in os.environ or PYTHON not in os.environ,
    reason=f"needs a checkout of the authors' repository ({CODE}) and a Python with its requirements ({PYTHON})",
)
def test_a_whole_run(tmp_path):
    output = tmp_path / "result.json"
    arguments = ["--authors-code", os.environ[CODE], "--authors-python", os.environ[PYTHON], "--size", "nano"]
    authors.main([*arguments, "--rounds", "1", "--threads", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["verified"]["nano"]["equal"]
    unmeasured = {row.name for row in ROWS if row.cell(result) is None}
    assert unmeasured == {"cold start to one token"}  # of the middle-sized model
