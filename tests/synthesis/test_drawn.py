"""The procedural backend through the command: no model, no endpoint, the same steps behind it."""

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from tests.synthesis.runs import all_bytes, check_complete, written
from tests.synthesis.test_pipeline import collate

from fusion_hf.cli import main
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.pipeline import run
from fusion_hf.synthesis.procedural import draw
from fusion_hf.synthesis.run_config import load_config
from fusion_hf.synthesis.run_report import finished_report

RECORDS = 72


def synthesize(folder: Path, **changes: object) -> Path:
    """Returns the folder of the data."""
    values = {"output": str(folder), "records": RECORDS, "backend": "procedural", "executor": {"tasks": 2}, **changes}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    assert main(["synthesize", str(path)]) == 0
    return folder / "data"


def test_all_categories_are_drawn(tmp_path: Path):
    data = synthesize(tmp_path / "first")
    check_complete(data, RECORDS)
    by_category = Counter(record["category"] for record in written(data))
    assert set(by_category) == set(load_categories())
    collated = [collate(data / f"{stage}.yaml", tmp_path / "cache") for stage in ("stage1", "stage1.5")]
    assert sum(collated) == by_category.total()
    assert finished_report(data)["models"]["describe"].keys() == {"procedural"}
    assert all_bytes(synthesize(tmp_path / "second")) == all_bytes(data)
    assert all_bytes(synthesize(tmp_path / "third", seed=1)) != all_bytes(data)


def test_a_share_of_the_tasks_has_all_categories(tmp_path: Path):
    data = synthesize(tmp_path / "run", executor={"tasks": 3}, categories={"SynthColor": 1, "SynthMultiChoice": 2})
    report = finished_report(data)["categories"]
    assert {name: counts["records"] for name, counts in report.items()} == {"SynthColor": 24, "SynthMultiChoice": 48}
    letters = report["SynthMultiChoice"]["answer_letters"]
    assert letters and set(letters) <= set("ABCD")


def test_many_tasks_of_few_records_have_all_categories(tmp_path: Path):
    """What is drawn does not depend on the number of tasks."""
    one, many = (synthesize(tmp_path / str(tasks), executor={"tasks": tasks}) for tasks in (1, RECORDS // 4))
    report = finished_report(many)["categories"]
    assert set(report) == set(load_categories())
    assert report.keys() == finished_report(one)["categories"].keys()
    assert {record["id"] for record in written(many)} == {record["id"] for record in written(one)}


@pytest.mark.parametrize(("function", "made"), [(run, "runs/synthesis/mix/data/README.md"), (draw, "*.png")])
def test_examples_of_docstrings(function: Callable, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    monkeypatch.chdir(tmp_path)
    example = dedent(inspect.getdoc(function).partition("Example:\n")[2])
    exec(example, {"Path": Path, "load_config": load_config, "run": run, "draw": draw})
    assert list(tmp_path.glob(made))
