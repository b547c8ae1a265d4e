"""Images and questions of a certificate."""

import json
from pathlib import Path

import pytest

from fusion_hf.common.errors import InputError
from fusion_hf.verification.questions import MAX_QUESTIONS, SIZES, draw_questions, read_questions

IMAGE = str(Path(__file__).parents[2] / "docs" / "assets" / "red_circle.png")


def test_drawn_questions():
    asked, again = draw_questions(), draw_questions()
    assert [question.image.size for question in asked] == list(SIZES)
    assert all(question.image.mode == "RGB" and question.text.strip() for question in asked)
    assert [(q.text, q.image.tobytes()) for q in asked] == [(q.text, q.image.tobytes()) for q in again]


def test_file(tmp_path: Path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"image": IMAGE, "messages": [{"role": "user", "content": "<image>\nwhat?"}]}) + "\n")
    (question,) = read_questions(path)
    assert question.text == "what?" and question.image.mode == "RGB"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "what?"}, "line 1: a record must have one question about one image file"),
        ({"image": "https://example.org/a.png", "question": "what?"}, "line 1: a record must have one question"),
        ({"image": IMAGE}, "line 1: .*question, messages"),
        ({"image": "gone.png", "question": "what?"}, "line 1: gone.png cannot be used: it cannot be read"),
        (
            {"image": IMAGE, "messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "user")]},
            "line 1: .*without earlier turns",
        ),
    ],
)
def test_other_records(tmp_path: Path, record: dict[str, object], message: str):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        read_questions(path)


def test_too_many(tmp_path: Path):
    path = tmp_path / "questions.jsonl"
    path.write_text((json.dumps({"image": IMAGE, "question": "what?"}) + "\n") * (MAX_QUESTIONS + 1))
    with pytest.raises(InputError, match=f"at most {MAX_QUESTIONS} records, got {MAX_QUESTIONS + 1}"):
        read_questions(path)
