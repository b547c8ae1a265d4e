"""All published benchmarks through lmms-eval, on made-up rows in their schema."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.judge import judge
from tests.evaluation.rows import ROWS, SUBMITTED, prompt_blocks, recorded_prompts, submitted_rows, write_rows
from tests.helpers.openai_server import serve

from fusion_hf.evaluation.benchmark_data import (
    AUTHORS,
    LMMS_EVAL,
    find_benchmark,
    folder_of,
    prepare_tasks,
)
from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS

pytestmark = [pytest.mark.eval, pytest.mark.slow]

PUBLISHED = [name for name, benchmark in BENCHMARKS.items() if benchmark.columns]
AUTHORS_OWN = [name for name in PUBLISHED if BENCHMARKS[name].authors_task is not None]
PROMPTS = [
    *((name, LMMS_EVAL) for name in PUBLISHED),
    *((name, AUTHORS) for name in [*AUTHORS_OWN, "textvqa_val_no_ocr"]),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[None]:
    """No network but a judge on this machine."""
    with pytest.MonkeyPatch.context() as patch, serve(judge()) as server:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OPENAI_API_KEY", "none")
        # the tasks are loaded without the command, which gives each the form of address that it reads
        patch.setenv("OPENAI_API_URL", f"{server.url}/v1/chat/completions")
        yield


@pytest.fixture(scope="module")
def load(environment, tmp_path_factory):
    """Loads a task of either prompt on the made-up rows; each but once."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    root, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("tasks")
    for name in PUBLISHED:
        write_rows(BENCHMARKS[name], root)
    loaded: dict[tuple[str, str], Any] = {}

    def load_task(name: str, prompts: str) -> Any:
        if (name, prompts) not in loaded:
            (prepared,) = prepare_tasks([name], prompts, root, folder)
            manager = TaskManager(include_path=str(prepared.yaml.parent), include_defaults=False, model_name="fusion")
            loaded[name, prompts] = get_task_dict([prepared.task_name], manager, "chat")[prepared.task_name]
        return loaded[name, prompts]

    return load_task


@pytest.mark.parametrize(("name", "prompts"), PROMPTS)
def test_prompt_is_the_recorded_one(load, name: str, prompts: str):
    task = load(name, prompts)
    assert prompt_blocks(task, task.task_docs[0]) == recorded_prompts()[prompts][name]


# where the answer is not the column `answer` or the first of `answers`
RIGHT = {
    ("ai2d", LMMS_EVAL): ["A"],
    ("scienceqa_img", LMMS_EVAL): ["A", "A"],
    ("seedbench", LMMS_EVAL): ["A", "B"],  # the question about a video is not asked
    ("mathvista", LMMS_EVAL): ["The answer is red.", "1.5"],  # the first is the judge's to understand
    ("mmvp", LMMS_EVAL): ["A", "B", "B", "A"],
    ("mmvp", AUTHORS): ["(a)", "(b)", "(a)", "(b)"],  # the labels as first published
    ("llava_in_the_wild", LMMS_EVAL): ["A red square."] * 3,
    ("hallusion_bench_image", LMMS_EVAL): ["yes", "no", "yes"],
}


def right_answers(name: str, prompts: str) -> list[str]:
    """Of the made-up rows that are asked."""
    for whose in (prompts, LMMS_EVAL):
        if (name, whose) in RIGHT:
            return RIGHT[name, whose]
    answers = [row.get("answer") or row["answers"] for row in ROWS[folder_of(find_benchmark(name))]]
    return [answer[0] if isinstance(answer, list) else answer for answer in answers]


class Parrot:
    """A model of lmms-eval that gives given answers."""

    rank, world_size, is_simple = 0, 1, False

    def __init__(self, task: Any, answers: list[str]):
        self.answers = answers
        self.task_dict = {task.task_name: task.dataset}

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.answers[request.args[3]] for request in requests]

    def clean(self) -> None:
        """There is nothing to free."""


def evaluate(task: Any, answers: list[str], output: Path) -> dict[str, Any]:
    """The task's results, as lmms-eval gives them."""
    from lmms_eval.evaluator import evaluate as lmms_evaluate

    task.set_config(key="num_fewshot", value=0)
    arguments = Namespace(output_path=str(output), process_with_media=False, reasoning_tags=None)
    done = lmms_evaluate(Parrot(task, answers), {task.task_name: task}, log_samples=False, cli_args=arguments)
    assert done["n-samples"][task.task_name]["effective"] == len(answers)
    return done["results"][task.task_name]


HIGHEST = {"MME^P": 200.0, "MME^C": 200.0}  # of one category each


@pytest.mark.parametrize(("name", "prompts"), PROMPTS)
def test_right_answers_get_the_highest_mark(load, tmp_path, name: str, prompts: str):
    benchmark = find_benchmark(name)
    results = evaluate(load(name, prompts), right_answers(name, prompts), tmp_path)
    marks = [results[metric] * benchmark.scale for metric in benchmark.metrics]
    columns = benchmark.columns or ("",)
    assert marks == pytest.approx([HIGHEST.get(column, 100.0) for column in columns])


# MMMU guesses a letter where an answer has none; what a judge says does not depend on the answer here
@pytest.mark.parametrize(
    ("name", "prompts"), [(n, p) for n, p in PROMPTS if n != "mmmu_val" and find_benchmark(n).judge is None]
)
def test_wrong_answers_get_nothing(load, tmp_path, name: str, prompts: str):
    task = load(name, prompts)
    results = evaluate(task, ["zzz"] * len(task.eval_docs), tmp_path)
    assert [results[metric] for metric in find_benchmark(name).metrics] == [0.0] * len(find_benchmark(name).metrics)


def test_mathvista_without_a_right_answer_is_zero(load, tmp_path):
    assert evaluate(load("mathvista", AUTHORS), ["blue", "9.5"], tmp_path)["llm_as_judge_eval,none"] == 0.0


def test_hallusion_asks_its_judge_about_each_run(load, tmp_path, monkeypatch):
    task = load("hallusion_bench_image", AUTHORS)
    assert evaluate(task, ["yes"] * 3, tmp_path)["aAcc,none"] == 100.0
    monkeypatch.setattr("tests.evaluation.judge.VERDICTS", (("Reference answer", "incorrect"),))
    assert evaluate(task, ["no"] * 3, tmp_path)["aAcc,none"] == 0.0


@pytest.mark.parametrize("name", SUBMITTED)
def test_split_of_a_server_can_be_asked(environment, tmp_path, name: str):
    from lmms_eval.tasks import TaskManager, get_task_dict

    rows = submitted_rows(name)
    write_rows(VARIANTS[name], tmp_path / "data", rows)
    (prepared,) = prepare_tasks([name], AUTHORS, tmp_path / "data", tmp_path)
    manager = TaskManager(include_path=str(prepared.yaml.parent), include_defaults=False, model_name="fusion")
    task = get_task_dict([prepared.task_name], manager, "chat")[prepared.task_name]
    assert len(task.eval_docs) == len(rows)
    assert prompt_blocks(task, task.task_docs[0])[0] == "<image>"


def test_no_task_has_the_name_of_a_built_in_one(load, tmp_path):
    from lmms_eval.tasks import TaskManager

    built_in = set(TaskManager().all_tasks)
    names = [name for name in (*BENCHMARKS, *VARIANTS) if name != "easy_vqa"]
    prepared = [task for prompts in (AUTHORS, LMMS_EVAL) for task in prepare_tasks(names, prompts, None, tmp_path)]
    assert built_in.isdisjoint(task.task_name for task in prepared)
    assert len({task.task_name for task in prepared}) == len(prepared)
    assert {find_benchmark(name).lmms_task for name in names} <= built_in


def test_all_run_from_end_to_end_with_fusion_nano(environment, tmp_path):
    for name in PUBLISHED:
        write_rows(BENCHMARKS[name], tmp_path / "data")
    options = [
        "--tasks",
        ",".join(PUBLISHED),
        "--data-root",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, "-m", "fusion_hf", "evaluate", *options, "--batch-size", "8"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "out").glob("record-*.json")
    tasks = json.loads(record.read_text(encoding="utf-8"))["tasks"]
    assert [(task["task"], task["status"]) for task in tasks] == [(name, "scored") for name in PUBLISHED]
    for task in tasks:
        benchmark = BENCHMARKS[task["task"]]
        assert set(benchmark.metrics) <= {metric["metric"] for metric in task["metrics"]}
        assert task["n"] == task["n_total"] > 0
        assert (task["judge"] is None) == (benchmark.judge is None)
    lines = record.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    (ours,) = (line for line in lines if line.startswith("| fusion-nano, measured | — |"))
    assert len(re.findall(r"\d\.\d", ours)) == sum(len(BENCHMARKS[name].columns) for name in PUBLISHED)
