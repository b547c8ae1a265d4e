"""`fusion-hf ask --input` with LLaVA's `question.jsonl`, and answers in the layout of its `answers.jsonl`."""

import json
from pathlib import Path

import pytest
from tests.helpers.questions import write_questions

from fusion_hf.common.errors import InputError
from fusion_hf.inference.batching import batch_generate

COUNT = 4
KEYS = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """As LLaVA's file, which is not where the images are; and one whose image is missing."""
    _, records = write_questions(tmp_path / "images", 12)
    asked = [record for record in records if "image" in record and "question" in record][:COUNT]
    lines = [
        {"question_id": number, "image": record["image"], "text": record["question"], "category": "default"}
        for number, record in enumerate(asked)
    ]
    lines.append({"question_id": "last", "image": "none.png", "text": "<image>\nwhat color is it?"})
    path = tmp_path / "question.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_answers_as_llava_s(run, questions: Path, tmp_path: Path):
    output, again = tmp_path / "answers.jsonl", tmp_path / "again.jsonl"
    arguments = ["ask", "--input", questions, "--image-root", tmp_path / "images", "--output-format", "llava"]
    result = run(*arguments, "--output", output)
    assert (result.returncode, result.stdout) == (1, f"{output}: {COUNT} answers\n")
    assert result.stderr == f"error: 1 of {COUNT + 1} records could not be answered; {output} says why.\n"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    assert all(list(line) == KEYS for line in lines)
    assert [line["question_id"] for line in lines] == [0, 1, 2, 3, "last"]
    assert [line["prompt"] for line in lines[:-1]] == [line["text"] for line in asked[:-1]]
    assert lines[-1]["prompt"] == "what color is it?" and lines[-1]["text"] == ""
    assert "must be an existing file or an http(s) URL, got 'none.png'" in lines[-1]["metadata"]["error"]
    assert {line["model_id"] for line in lines} == {"fusion-nano"}
    assert len({line["answer_id"] for line in lines}) == COUNT + 1

    plain = batch_generate(questions, image_root=tmp_path / "images", output=again, progress=False)
    assert [result.get("answer", "") for result in plain] == [line["text"] for line in lines]
    assert [json.loads(line) for line in again.read_text().splitlines()] == plain
    assert [result["id"] for result in plain] == [0, 1, 2, 3, "last"]


def test_the_same_run_writes_the_same_bytes(questions: Path, tmp_path: Path):
    outputs = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for output in outputs:
        batch_generate(questions, image_root=tmp_path / "images", output=output, output_format="llava", progress=False)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_own_names_come_first():
    record = {"id": "mine", "question_id": 5, "question": "what color is the shape?", "text": "something else"}
    (result,) = batch_generate([record], progress=False)
    assert result["id"] == "mine" and "answer" in result
    (broken,) = batch_generate([{"question_id": [5], "text": "what color is the shape?"}], progress=False)
    assert "`id` must be text or a whole number, got list" in broken["error"]


def test_an_unknown_format():
    with pytest.raises(InputError, match=r"output_format.*'answers', 'llava', got 'xml'"):
        batch_generate([{"question": "what?"}], output_format="xml")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["picture.png", "what?", "--output-format", "llava"],
            "`--output-format` is only allowed with `--input`",
        ),
        (["picture.png", "what?", "--image-root", "docs"], "`--image-root` is only allowed with `--input`, got docs"),
        (
            ["--input", "a.jsonl", "--output", "b", "--image-root", "none"],
            "must be a folder of images, got none",
        ),
        (["--input", "a.jsonl", "--output", "b", "--output-format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_wrong_command_lines(run, arguments: list[str], part: str):
    result = run("ask", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert part in result.stderr and result.stderr.count("\n") == 1
