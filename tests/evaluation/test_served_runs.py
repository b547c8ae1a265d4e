"""The command asks `fusion-hf serve`, in real processes: the same answers, and a server that dies."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.evaluation.runs import (
    LIMIT,
    SECONDS,
    TORCHRUN,
    by_question,
    entries,
    figures,
    finish,
    record_of,
    run_lmms_eval,
    start,
)
from tests.helpers.serving import Server, run_server, start_server

pytestmark = [pytest.mark.eval, pytest.mark.slow]

KEY, VARIABLE = "sk-very-secret", "TEST_EVALUATION_KEY"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("local")
    finish(output, "--batch-size", 16)
    return output


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_server("--api-key-env", VARIABLE, **{VARIABLE: KEY}) as server:
        yield server


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["alone", "torchrun"])
def test_a_server_is_as_a_model_in_the_process(local: Path, server: Server, tmp_path: Path, launcher: list[str]):
    options = ["--url", f"{server.url}/v1", "--api-key-env", VARIABLE, "--concurrency", 3]
    record = finish(tmp_path, *options, launcher=launcher, **{VARIABLE: KEY})
    here = record_of(local)
    assert figures(record) == figures(here)
    assert by_question(tmp_path) == by_question(local)
    assert len(by_question(local)) > LIMIT // 2
    assert record["parallel"] == 3
    assert record["model"] == {**here["model"], "url": f"{server.url}/v1", "settings": None}
    (table,) = tmp_path.glob("record-*.md")
    assert f"at {server.url}/v1" in table.read_text(encoding="utf-8")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_server_that_dies_and_comes_back(local: Path, tmp_path: Path):
    output = tmp_path / "output"
    with start_server(errors=tmp_path / "errors") as (process, server):
        run = start(output, "--url", server.url, "--concurrency", 2)
        deadline = time.monotonic() + SECONDS
        while not (output / "answers").is_dir() or len(entries(output)) < 10:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        _, errors = run.communicate(timeout=SECONDS)
    assert run.returncode == 1, errors
    (task,) = record_of(output)["tasks"]
    assert (task["status"], task["metrics"]) == ("failed", [])
    assert f"{server.url}/v1/chat/completions does not answer: connection failed" in task["reason"]
    assert "error: easy_vqa is not scored" in errors
    before = len(entries(output))
    assert 10 <= before < len(by_question(local))
    with run_server() as again:  # elsewhere, with the same model
        record = finish(output, "--url", again.url)
    assert figures(record) == figures(record_of(local))
    assert by_question(output) == by_question(local)
    keys = [entry["key"] for entry in entries(output)]
    assert len(keys) == len(set(keys))


def test_lmms_evals_own_command_asks_a_server(server: Server, tmp_path: Path):
    from fusion_hf.evaluation.tasks.easy_vqa import prepare_easy_vqa

    prepare_easy_vqa(tmp_path, "mine")
    arguments = f"url={server.url}/v1,api_key_env={VARIABLE},query_len=4"
    results = run_lmms_eval(tmp_path, "mine", model_args=arguments, **{VARIABLE: KEY})
    assert results["exact_match,none"] > 0.9


def test_a_dead_server_is_no_task_that_failed(tmp_path: Path):
    run = start(tmp_path, "--url", "http://127.0.0.1:9/v1")
    _, errors = run.communicate(timeout=SECONDS)
    assert run.returncode == 2
    assert errors.startswith("error: --url http://127.0.0.1:9/v1 cannot be asked: ") and errors.count("\n") == 1
    assert not list(tmp_path.glob("record-*"))
