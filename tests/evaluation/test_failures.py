"""What must not pass for wrong answers: judges that are dead, data that is missing or of another schema."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from tests.evaluation.judge import judge, mortal_judge
from tests.evaluation.rows import ROWS, write_rows
from tests.helpers.http_server import HttpServer, Response
from tests.helpers.openai_server import serve

from fusion_hf.evaluation.benchmark_data import folder_of
from fusion_hf.evaluation.benchmarks import BENCHMARKS

pytestmark = [pytest.mark.eval, pytest.mark.slow]

JUDGED = [name for name, benchmark in BENCHMARKS.items() if benchmark.judge is not None]
SECONDS = 500
# a port of this machine that nobody listens at
DEAD = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in (*JUDGED, "pope"):
        write_rows(BENCHMARKS[name], root)
    return root


def evaluate(
    tasks: list[str], data: Path, output: Path, *more: str, **environment: str
) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, the tasks' records and what was said on standard error."""
    options = ["--tasks", ",".join(tasks), "--data-root", str(data), "--output", str(output), *more]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "AZURE_", "API_"))}
    done = subprocess.run(
        [sys.executable, "-m", "fusion_hf", "evaluate", *options],
        env=clean | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    (record,) = output.glob("record-*.json")
    return done.returncode, json.loads(record.read_text(encoding="utf-8"))["tasks"], done.stderr


def assert_failed(result: tuple[int, list[dict[str, Any]], str], tasks: list[str], reason: str) -> None:
    status, records, errors = result
    assert status == 1
    assert [(task["task"], task["status"], task["metrics"]) for task in records] == [(t, "failed", []) for t in tasks]
    for task in records:
        assert reason in task["reason"], task["reason"]
        assert f"error: {task['task']} is not scored: " in errors


def test_without_a_key(data, tmp_path):
    assert_failed(evaluate(JUDGED, data, tmp_path), JUDGED, "OPENAI_API_KEY is not set")


def test_without_a_server(data, tmp_path):
    result = evaluate(JUDGED, data, tmp_path, OPENAI_API_KEY="none", OPENAI_API_URL=DEAD)
    assert_failed(result, JUDGED, f"at {DEAD}/chat/completions does not answer")
    assert not "".join(path.read_text() for path in (tmp_path / "answers").iterdir())  # nothing was answered in vain


def test_a_server_of_another_protocol(data, tmp_path):
    with HttpServer(lambda request: Response(b"<html>hello</html>")) as page:
        result = evaluate(["mmvet"], data, tmp_path, OPENAI_API_KEY="none", OPENAI_API_URL=f"{page.url}/v1")
    assert_failed(result, ["mmvet"], "does not answer")


@pytest.mark.parametrize("task", JUDGED)
def test_a_server_that_dies(data, tmp_path, task: str):
    with serve(mortal_judge()) as server:
        result = evaluate([task], data, tmp_path, OPENAI_API_KEY="none", OPENAI_API_URL=f"{server.url}/v1")
    assert_failed(result, [task], "Scoring reported")


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions"])
def test_both_forms_of_the_address(data, tmp_path, ending: str):
    with serve(judge()) as server:
        status, records, errors = evaluate(
            JUDGED, data, tmp_path, OPENAI_API_KEY="none", OPENAI_API_URL=f"{server.url}/v1{ending}"
        )
    assert status == 0, errors
    assert [task["status"] for task in records] == ["scored"] * len(JUDGED)


def test_an_address_that_is_none(data, tmp_path):
    result = evaluate(["mmvet"], data, tmp_path, OPENAI_API_KEY="none", OPENAI_API_URL="file:///etc")
    assert_failed(result, ["mmvet"], "OPENAI_API_URL must be an address with http")


def test_missing_data_beside_data_that_is_there(data, tmp_path):
    status, records, errors = evaluate(["mmstar", "pope"], data, tmp_path)
    assert status == 1
    assert [task["status"] for task in records] == ["failed", "scored"]
    assert "InputError: mmstar" in records[0]["reason"]
    assert "error: mmstar is not scored" in errors


def test_data_of_another_schema(data, tmp_path):
    root = tmp_path / "data"
    write_rows(BENCHMARKS["pope"], root)
    (file,) = (root / folder_of(BENCHMARKS["pope"])).glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.drop_columns(["answer"]), file)
    assert_failed(evaluate(["pope"], root, tmp_path / "out"), ["pope"], "answer")


def test_a_question_about_several_images(data, tmp_path):
    """lmms-eval's prompt of MMMU shows all of them."""
    root = tmp_path / "data"
    write_rows(BENCHMARKS["mmmu_val"], root, ROWS["mmmu_val"][:1])
    result = evaluate(["mmmu_val"], root, tmp_path / "out", "--prompts", "lmms-eval")
    assert_failed(result, ["mmmu_val"], "1 requests failed")
    assert "A request must have at most one image, got 2." in result[1][0]["failures"][0]
    status, records, errors = evaluate(["mmmu_val"], root, tmp_path / "authors")
    assert (status, records[0]["status"]) == (0, "scored"), errors  # theirs shows the first
