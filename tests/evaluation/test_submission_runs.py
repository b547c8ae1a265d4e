"""The command on test sets whose answers go to a server, on made-up rows: the files, read back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.rows import SUBMITTED, submitted_rows, write_rows
from tests.evaluation.runs import ENVIRONMENT, ROOT, TORCHRUN, record_of

from fusion_hf.evaluation.benchmarks import VARIANTS

pytestmark = [pytest.mark.eval, pytest.mark.slow]

SECONDS = 600


def evaluate(names: list[str], data: Path, output: Path, *launcher: str) -> subprocess.CompletedProcess:
    options = ["--tasks", ",".join(names), "--data-root", data, "--output", output, "--batch-size", 8]
    command = [sys.executable, *(launcher or ("-m",)), "fusion_hf", "evaluate", *map(str, options)]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=SECONDS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in SUBMITTED:
        write_rows(VARIANTS[name], root, submitted_rows(name))
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The output folder and what the command said."""
    output = tmp_path_factory.mktemp("output")
    return output, evaluate(SUBMITTED, data, output)


def read_json(output: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((output / "submissions" / f"{name}.json").read_text(encoding="utf-8"))


def test_records_and_tables_say_that_files_are_written(run):
    output, done = run
    assert done.returncode == 0, done.stderr
    tasks = record_of(output)["tasks"]
    assert [(task["task"], task["status"], task["metrics"]) for task in tasks] == [
        (name, "submission written", []) for name in SUBMITTED
    ]
    (table,) = output.glob("record-*.md")
    for task in tasks:
        n = len(submitted_rows(task["task"]))
        assert (task["n"], task["n_total"]) == (n, n)
        assert (output / task["submission"]).is_file()
        assert f"`{task['task']}`: submission written, {n} answers in {task['submission']}, no score" in (
            table.read_text(encoding="utf-8")
        )
    assert done.stdout.splitlines()[-2:] == [str(table.with_suffix(".json")), str(table)]


def test_vizwiz(run):
    rows = read_json(run[0], "vizwiz_vqa_test")
    assert [row["image"] for row in rows] == ["drawn_1.jpg", "drawn_0.jpg"]
    assert all(row.keys() == {"image", "answer"} and row["answer"] for row in rows)


def test_docvqa(run):
    rows = read_json(run[0], "docvqa_test")
    assert [row["questionId"] for row in rows] == [7, 3]
    assert all(row.keys() == {"questionId", "answer"} and row["answer"] for row in rows)


@pytest.mark.parametrize("name", ["mmbench_en_test", "mmbench_cn_test"])
def test_mmbench(run, name: str):
    from openpyxl import load_workbook

    (sheet,) = load_workbook(run[0] / "submissions" / f"{name}.xlsx").worksheets
    header, *rows = [[cell.value for cell in row] for row in sheet]
    written = [dict(zip(header, row, strict=True)) for row in rows]
    asked = submitted_rows(name)
    columns = ("index", "question", "A", "B", "C", "D", "category")
    assert [[row[column] for column in columns] for row in written] == [
        [row[column] for column in columns] for row in asked
    ]
    assert [row["index"] for row in written] == [1, 0]
    assert all(row["prediction"] for row in written)


def test_two_processes_write_the_same(run, data, tmp_path):
    done = evaluate(["vizwiz_vqa_test", "docvqa_test"], data, tmp_path, *TORCHRUN, "-m")
    assert done.returncode == 0, done.stderr
    for name in ("vizwiz_vqa_test", "docvqa_test"):
        assert read_json(tmp_path, name) == read_json(run[0], name)


def test_a_request_that_fails_leaves_no_file(tmp_path):
    name, output = "docvqa_test", tmp_path / "output"
    rows = submitted_rows(name)
    data = tmp_path / "data"
    write_rows(VARIANTS[name], data, rows)
    assert evaluate([name], data, output).returncode == 0
    assert read_json(output, name)
    rows[1]["image"] = {"bytes": b"no picture", "path": None}
    write_rows(VARIANTS[name], data, rows)
    done = evaluate([name], data, output)
    assert done.returncode == 1
    assert "error: docvqa_test is not scored: RequestsFailed: 1 requests failed" in done.stderr
    assert list((output / "submissions").iterdir()) == []
    (task,) = record_of(output)["tasks"]
    assert (task["status"], task["submission"]) == ("failed", None)
