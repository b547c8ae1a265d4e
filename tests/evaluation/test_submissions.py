"""Files for servers: what is in them, and that there is none where an answer is missing. The tables need openpyxl."""

import json
import os

import pytest

from fusion_hf.cli import main
from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS
from fusion_hf.evaluation.submissions import FORMATS, SubmissionIncomplete, submission_file, write_submission

VIZWIZ, DOCVQA, MMBENCH = (VARIANTS[name] for name in ("vizwiz_vqa_test", "docvqa_test", "mmbench_en_test"))
ANSWERS = [{"questionId": 8, "answer": "ein Wörtchen"}, {"questionId": 3, "answer": ""}]


def test_what_is_submitted_has_a_format():
    known = {**BENCHMARKS, **VARIANTS}
    assert {name for name, benchmark in known.items() if benchmark.is_submitted} == set(FORMATS)


def test_answers_are_written_in_their_order_and_with_nothing_else(tmp_path):
    rows = [{**row, "confidence": 1.0} for row in ANSWERS]
    path = write_submission(DOCVQA, rows, 2, tmp_path / "new")
    assert path == submission_file(DOCVQA, tmp_path / "new") == tmp_path / "new" / "docvqa_test.json"
    assert json.loads(path.read_text(encoding="utf-8")) == ANSWERS
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("rows", [[*ANSWERS, {"questionId": 5, "answer": None}], [*ANSWERS, {"questionId": 5}]])
def test_question_without_an_answer_is_named_and_leaves_no_file(tmp_path, rows):
    with pytest.raises(SubmissionIncomplete, match=r"1 of 3 questions have no answer\. The first one is questionId 5"):
        write_submission(DOCVQA, rows, 3, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_total", [1, 3])
def test_as_many_answers_as_questions_are_wanted(tmp_path, n_total: int):
    with pytest.raises(SubmissionIncomplete, match=f"must be {n_total} answers, got 2"):
        write_submission(DOCVQA, ANSWERS, n_total, tmp_path)
    with pytest.raises(SubmissionIncomplete, match="must be 0 answers, got 0"):
        write_submission(DOCVQA, [], 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_writing_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = write_submission(DOCVQA, ANSWERS, 2, tmp_path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_submission(DOCVQA, ANSWERS[:1], 1, tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.eval
def test_table_of_mmbench(tmp_path):
    from openpyxl import load_workbook

    row = {
        "index": 7,
        "question": "=1+1 is?",
        "hint": "nan",
        "A": "2",
        "B": "=2",
        "C": "nan",
        "D": None,
        "prediction": "#N/A\x0b A",
        "category": "sum",
        "L2-category": "logic",
    }
    path = write_submission(MMBENCH, [row, {**row, "index": 3, "D": "none of them"}], 2, tmp_path)
    (sheet,) = load_workbook(path).worksheets
    assert [cell.value for cell in sheet[1]] == [
        *("index", "question", "A", "B", "C", "D"),
        *("prediction", "category", "l2_category"),
    ]
    assert [cell.value for cell in sheet[2]] == [7, "=1+1 is?", "2", "=2", None, None, "#N/A A", "sum", "logic"]
    assert [cell.data_type for cell in sheet[2]] == list("nsssnnsss")
    assert [sheet["A3"].value, sheet["F3"].value, sheet.max_row] == [3, "none of them", 3]


@pytest.mark.parametrize("name", FORMATS)
def test_a_try_of_what_is_submitted_is_refused(name: str, capsys):
    assert main(["evaluate", "--tasks", f"easy_vqa,{name}", "--limit", "5"]) == 2
    assert f"`--limit` is not allowed for {name}, whose server requires all answers" in capsys.readouterr().err


def test_all_are_not_submitted(capsys):
    assert main(["evaluate", "--tasks", "all", "--dry-run"]) == 0
    assert not {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()} & set(FORMATS)
    assert main(["evaluate", "--tasks", "docvqa_test", "--dry-run"]) == 0
    assert capsys.readouterr().out == "docvqa_test: all there\n"
