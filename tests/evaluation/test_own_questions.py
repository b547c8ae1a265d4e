"""Answers to a file of questions that has the right ones."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.comparison_page import write_page
from fusion_hf.evaluation.comparison_report import write_text
from fusion_hf.evaluation.own_questions import score_answers
from fusion_hf.evaluation.run_answers import RunAnswers, read_run
from fusion_hf.evaluation.run_comparison import compare_runs

QUESTIONS = [
    {"question_id": 7, "image": "a.png", "text": "which?", "answer": "red"},
    {"question_id": "x", "image": "a.png", "text": "how many?", "answer": "2"},
    {"id": 9, "image": "gone.png", "question": "what?", "answer": "cup"},
]
BASE = [{"id": 9, "answer": "cup "}, {"id": 7, "answer": "blue"}, {"id": "x", "answer": "3"}]  # as `ask` writes them
MINE = [
    {"question_id": 7, "prompt": "which?", "text": "red"},
    {"question_id": "x", "prompt": "how many?", "text": "3"},
]


def write(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return write(tmp_path / "own.jsonl", QUESTIONS)


def scored(folder: Path, questions: Path, entries: list[dict], name: str) -> RunAnswers:
    return score_answers(read_run(write(folder / name, entries)), questions)


def test_both_layouts_of_answers_are_scored_by_their_ids(tmp_path: Path, questions: Path) -> None:
    runs = scored(tmp_path, questions, BASE, "base.jsonl"), scored(tmp_path, questions, MINE, "mine.jsonl")
    (task,) = compare_runs(*runs)
    (metric,) = task.metrics
    assert (task.task, task.alone, metric.metric) == ("own", (1, 0), "exact_match")
    assert (metric.test.first, metric.test.second, metric.test.clusters) == (0.0, 0.5, 1)
    assert task.directions == {"better": 1}
    assert [sample.scores for sample in runs[0].tasks["own"].samples] == [{"exact_match": s} for s in (1.0, 0.0, 0.0)]
    page = write_page(*runs, [task])
    assert page.count("data:image/jpeg;base64,") == 1 and "which?" in page
    assert write_text(*runs, [task]).startswith(f"RUN_A: {tmp_path / 'base.jsonl'}\n")


def test_without_questions_only_answers_are_compared(tmp_path: Path) -> None:
    runs = [read_run(write(tmp_path / f"{name}.jsonl", lines)) for name, lines in (("a", BASE), ("b", MINE))]
    (task,) = compare_runs(*runs)
    text = write_text(*runs, [task])
    assert "\n\n2 questions\n" in text and "--questions" in text


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"question_id": 7, "text": "which?"}], "line 1 must have"),
        ([{"answer": "red"}], "line 1 must have"),
        ([*QUESTIONS, QUESTIONS[0]], "got question 7 twice"),
        (QUESTIONS[:1], "must contain all answered questions, but lacks 'x'"),
    ],
)
def test_questions_that_do_not_fit(tmp_path: Path, entries: list[dict], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored(tmp_path, write(tmp_path / "own.jsonl", entries), MINE, "mine.jsonl")


def test_runs_with_scores_are_refused(tmp_path: Path, questions: Path) -> None:
    sample = {"doc_id": 0, "filtered_resps": "red", "target": "red", "exact_match": 1.0}
    run = read_run(write(tmp_path / "t_samples_pope.jsonl", [sample]))
    with pytest.raises(InputError, match=r"must be answers.jsonl files if --questions is given"):
        score_answers(run, questions)
