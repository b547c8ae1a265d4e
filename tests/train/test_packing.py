"""Why there is no packing: what it could save beside `group_by: length`, as benchmarks/packing.py has measured."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.helpers.training_data import make_record, write_images, write_json

from fusion_hf.training import run as training
from fusion_hf.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
MOST = 0.1  # of a run, that packing may save before it would be worth its masks


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packing", ROOT / "benchmarks" / "packing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "packing.json").read_text())


def test_packing_would_save_little_beside_grouping_by_length(result: dict[str, Any]):
    by_length = [row for row in result["found"] if row["order"] == "length"]
    assert len(by_length) == 2 * 2 * 4
    assert max(max(row["flops"], row["slowest"]) for row in by_length) < MOST
    short = [row for row in result["found"] if row["mixture"] == "short"]
    assert max(max(row["flops"], row["slowest"]) for row in short) < MOST


@pytest.mark.parametrize("order", ["none", "modality_length", "length"])
def test_the_result_is_what_the_benchmark_gives(benchmark: ModuleType, result: dict[str, Any], order: str):
    case = benchmark.Case("short", 36, "8 GPUs, 4 records a pass", order)
    (row,) = [row for row in result["found"] if all(row[key] == value for key, value in vars(case).items())]
    found = vars(case.measure(result["records"]))
    assert {key: row[key] for key in found} == pytest.approx(found, abs=1e-4)


def test_the_document_has_the_figures(result: dict[str, Any]):
    text = (ROOT / "docs" / "benchmarks" / "packing.md").read_text(encoding="utf-8")
    for layout in dict.fromkeys(row["layout"] for row in result["found"]):
        cells = []
        for order in ("none", "modality_length", "length"):
            rows = [row for row in result["found"] if row["mixture"] == "llava" and row["query_len"] == 36]
            (row,) = [row for row in rows if (row["layout"], row["order"]) == (layout, order)]
            cells += [f"{row['padding']:.1%}", f"{row['slowest']:.1%}"]
        assert f"| {layout} | {' | '.join(cells)} |".replace("%", " %") in text
    for mixture in ("llava", "short"):
        rows = [row for row in result["found"] if row["mixture"] == mixture and row["order"] == "length"]
        most = max(row["slowest"] for row in rows)
        assert f"{most:.1%}".replace("%", " %") in text


def test_a_run_grouped_by_length(recipe: Path, tmp_path: Path):
    """Micro-batches hold records of like sizes; all are trained on."""
    data = tmp_path / "more"
    records = []
    write_images(data)
    for number in range(16):
        record = make_record(number % 3)
        record["conversations"] = record["conversations"][: 2 if number % 2 else 4]
        records.append({**record, "id": str(number)})
    file = write_json(data / "a.json", records)
    values = load_recipe(recipe, [f"data={file}", "group_by=length", "global_batch_size=4", "num_train_epochs=1"])
    arguments = training.make_arguments(values, 1)
    processor, model = training.load_start(arguments)
    trainer = training.make_trainer(model, processor, arguments)
    order = [key.index for key in trainer._get_train_sampler()]
    turns = np.array([2 - number % 2 for number in order]).reshape(4, 4)
    assert sorted(order) == list(range(16)) and all(len(set(step)) == 1 for step in turns.tolist())
    trainer.train()
    assert trainer.state.global_step == 4
