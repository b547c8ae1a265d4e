"""The command with lmms-eval, in real processes: killed, doubled, and with requests that fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.evaluation.runs import (
    ENVIRONMENT,
    LAUNCHERS,
    LIMIT,
    ROOT,
    SECONDS,
    answers,
    entries,
    finish,
    record_of,
    run_lmms_eval,
    start,
)

pytestmark = pytest.mark.eval

OPTIONS = "red blue circle rectangle yes no teal green triangle gray black brown yellow".split()


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("batches")
    finish(output, "--batch-size", 16)
    return output


def test_the_record_says_what_was_run(batches):
    record = record_of(batches)
    (task,) = record["tasks"]
    assert (task["task"], task["status"], task["n"]) == ("easy_vqa", "scored", LIMIT)
    assert {metric["metric"] for metric in task["metrics"]} >= {"exact_match,none"}
    assert all(0.9 < metric["value"] <= 1 for metric in task["metrics"])
    assert record["versions"]["lmms_eval"] == "0.7.3"
    assert "--limit" in record["command"]
    assert record["model"]["revision"].startswith("fusion-nano@")
    assert record["model"]["published"] is None


def test_a_table_stands_beside_the_record(batches):
    (path,) = batches.glob("record-*.json")
    (task,) = record_of(batches)["tasks"]
    exact = next(metric["value"] for metric in task["metrics"] if metric["metric"] == "exact_match,none")
    line = f"- `easy_vqa`: exact_match {100 * exact:.1f}; {LIMIT} of {task['n_total']} questions"
    assert line in path.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert task["n_total"] > LIMIT


AS_FUSION_L = """
import sys
from fusion_hf.cli import main
from fusion_hf.hub import family
family.find_member = lambda config: {member.name: member for member in family.MEMBERS}["FUSION-L 3B"]
sys.exit(main(["evaluate", "--tasks", "easy_vqa", "--limit", "2", "--output", sys.argv[1]]))
"""


def test_a_model_of_published_sizes_is_compared(tmp_path):
    subprocess.run([sys.executable, "-c", AS_FUSION_L, tmp_path], env=ENVIRONMENT, cwd=ROOT, check=True)
    assert record_of(tmp_path)["model"]["published"] == "FUSION-L 3B"
    (table,) = tmp_path.glob("record-*.md")
    assert "| FUSION-L 3B, published | 308 |" in table.read_text(encoding="utf-8")


def test_one_by_one_is_as_in_batches(batches, tmp_path):
    record = finish(tmp_path, "--batch-size", 1)
    assert record["tasks"] == record_of(batches)["tasks"]
    assert answers(tmp_path) == answers(batches)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["torchrun", "accelerate"])
def test_two_processes_are_as_one(batches, tmp_path, launcher):
    record = finish(tmp_path, "--batch-size", 16, launcher=launcher)
    assert record["processes"] == 2
    assert record["tasks"] == record_of(batches)["tasks"]
    assert answers(tmp_path) == answers(batches)
    assert all(path.stat().st_size for path in (tmp_path / "answers").glob("*.jsonl"))


def test_a_killed_run_goes_on_and_asks_nothing_twice(batches, tmp_path):
    process = start(tmp_path)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "answers").is_dir() or len(entries(tmp_path)) < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(entries(tmp_path))
    assert before < len(answers(batches))
    record = finish(tmp_path)
    keys = [entry["key"] for entry in entries(tmp_path)]
    assert len(keys) == len(set(keys)) == len(answers(batches))
    assert record["tasks"] == record_of(batches)["tasks"]


@pytest.fixture
def broken_data(tmp_path: Path) -> dict[str, str]:
    """easy-vqa's package with one image broken, as variables of a process that finds it first."""
    import easy_vqa

    package = Path(easy_vqa.__file__).parent
    own = tmp_path / "packages" / "easy_vqa"
    own.parent.mkdir()
    subprocess.run(["cp", "-r", package, own], check=True)
    (own / "data" / "test" / "images" / "3.png").write_bytes(b"no picture")
    return {"PYTHONPATH": os.pathsep.join([str(own.parent), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("launcher", [[], *LAUNCHERS], ids=["alone", "torchrun", "accelerate"])
def test_a_request_that_fails_fails_the_task(broken_data, tmp_path, launcher):
    output = tmp_path / "output"
    process = start(output, launcher=launcher, **broken_data)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, errors
    (task,) = record_of(output)["tasks"]
    assert (task["status"], task["metrics"]) == ("failed", [])
    assert "requests failed" in task["reason"]
    assert "cannot identify image file" in task["failures"][0] + task["reason"]
    assert "error: easy_vqa is not scored" in errors


def test_a_judge_that_is_dead_fails_the_task():
    from loguru import logger

    from fusion_hf.evaluation.judges import JudgeFailed, JudgeWatch

    with pytest.raises(JudgeFailed, match="All 3 attempts failed"), JudgeWatch():
        logger.error("All 3 attempts failed. Last error message: connection refused")
    with pytest.raises(JudgeFailed, match="GPT API failed to answer"), JudgeWatch():
        logger.info("GPT API failed to answer. ")
    with JudgeWatch():
        logger.info("Overall Score: 31.00")


def test_plain_lmms_eval_knows_fusion(tmp_path):
    from fusion_hf.evaluation.tasks.easy_vqa import prepare_easy_vqa

    prepare_easy_vqa(tmp_path, "mine")
    results = run_lmms_eval(tmp_path, "mine")
    assert results["exact_match,none"] > 0.9


def test_lmms_eval_scores_options(tmp_path):
    from fusion_hf.evaluation.tasks.easy_vqa import prepare_easy_vqa

    path = prepare_easy_vqa(tmp_path, "options")
    kept = ("dataset_", "  ", "task:", "test_split", "doc_to_")
    lines = [line for line in path.read_text().split("generation_kwargs:")[0].splitlines() if line.startswith(kept)]
    lines += ["output_type: multiple_choice", f"doc_to_choice: {OPTIONS}"]
    lines += ["metric_list:", "- {metric: acc, aggregation: mean, higher_is_better: true}"]
    path.write_text("\n".join(lines) + "\n")
    results = run_lmms_eval(tmp_path, "options", "--force_simple")
    assert results["acc,none"] > 0.9
