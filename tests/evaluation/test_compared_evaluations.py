"""Evaluations with lmms-eval, compared; samples of its own command; images that are in no file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.evaluation.compared_runs import copy_nano, never_red
from tests.evaluation.rows import write_rows
from tests.evaluation.runs import ENVIRONMENT, ROOT, SECONDS, finish, run_lmms_eval

from fusion_hf.evaluation.benchmarks import BENCHMARKS
from fusion_hf.evaluation.run_answers import read_run

pytestmark = pytest.mark.eval

COUNT = 60  # questions about several images
LIMIT = ["--limit", COUNT]


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusion_hf", "compare", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=SECONDS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("reference")
    finish(output, *LIMIT)
    return output


def test_samples_are_what_was_asked_and_scored(reference):
    (task,) = read_run(reference).tasks.values()
    assert [sample.doc_id for sample in task.samples] == list(range(COUNT))
    scores = [sample.scores["exact_match"] for sample in task.samples]
    assert sum(scores) / COUNT == pytest.approx(task.metrics["exact_match"])
    first = task.samples[0]
    assert first.answer == first.target and Path(first.image).is_file()
    assert first.asked.generation["max_new_tokens"] == 6
    assert f"{first.asked.messages[0]['content'][1]['text']}<|im_end|>" in first.asked.prompt


def test_two_evaluations_are_compared_and_the_stage_is_named(reference, tmp_path):
    finish(tmp_path / "run", *LIMIT, "--model", copy_nano(tmp_path / "nano", never_red))
    result = compare(reference, tmp_path / "run", "--stages", "--json")
    content = json.loads(result.stdout)
    (task,), (stages,) = content["tasks"], content["stages"]
    assert task["metrics"][0]["metric"] == "exact_match" and task["directions"] == {"worse": task["changed"]}
    assert stages["first"] == "decoding" and stages["is_reproduced"]
    assert "generation_config.suppress_tokens" in [setting["name"] for setting in stages["settings"]]
    assert (result.returncode, result.stderr) == (1, "")


def test_another_batch_size_and_more_processes_change_no_answer(reference, tmp_path):
    finish(tmp_path, *LIMIT, "--batch-size", 16)
    result = compare(reference, tmp_path, "--stages", "--json")
    content = json.loads(result.stdout)
    (task,), (stages,) = content["tasks"], content["stages"]
    assert task["changed"] == 0 and stages["is_reproduced"]
    assert set(stages["differing"]) <= {"features", "logits"}  # by rounding
    assert [setting["name"] for setting in stages["settings"]] == ["batch_size"]


def test_samples_of_lmms_evals_own_command(reference, tmp_path):
    from fusion_hf.evaluation.tasks.easy_vqa import prepare_easy_vqa

    prepare_easy_vqa(tmp_path, "fusion_easy_vqa")
    run_lmms_eval(tmp_path, "fusion_easy_vqa", "--log_samples")
    result = compare(reference, tmp_path / "output")
    assert (result.returncode, result.stderr) == (0, "")
    assert "easy_vqa: 20 questions, in " in result.stdout  # the limit of that helper
    assert "answers: 0 changed" in result.stdout
    assert f"note: {COUNT - 20} questions are only in RUN_A and 0 only in RUN_B. They are left out." in result.stdout


def test_images_in_the_data_are_found(tmp_path):
    """Those of POPE are in Parquet: they are read from the data root that the record names."""
    write_rows(BENCHMARKS["pope"], tmp_path / "data")
    options = ["-m", "fusion_hf", "evaluate", "--tasks", "pope", "--data-root", tmp_path / "data"]
    for name, more in (("a", []), ("b", ["--dtype", "bfloat16"])):
        arguments = [sys.executable, *map(str, [*options, "--output", tmp_path / name, *more])]
        subprocess.run(arguments, env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True, timeout=SECONDS)
    (samples,) = (tmp_path / "b").glob("samples/*/pope.jsonl")
    content = [json.loads(line) for line in samples.read_text().splitlines()]
    assert all(entry["image"] is None for entry in content)
    content[0]["answer"] = "another"
    samples.write_text("".join(json.dumps(entry) + os.linesep for entry in content))
    result = compare(tmp_path / "a", tmp_path / "b", "--stages", "--page", tmp_path / "page.html")
    assert "pope: the first stage that differs is features: from vision layer 0 on" in result.stdout
    assert "note: RUN_B: 1 of " in result.stdout  # the answer that no model gave
    assert (result.returncode, result.stderr) == (1, "")
    assert "data:image/jpeg;base64," in (tmp_path / "page.html").read_text(encoding="utf-8")
