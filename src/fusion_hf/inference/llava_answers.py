"""Answers in the format of LLaVA's `answers.jsonl`, which its evaluation scripts read."""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from fusion_hf.data.record_parsing import RecordProblem
from fusion_hf.inference.answer_file import Result
from fusion_hf.inference.question_files import Entry, parse_question
from fusion_hf.model.chat_fusion import IMAGE_TOKEN


def llava_answers(entries: Sequence[Entry], model_id: str) -> Callable[[int, Result], dict[str, Any]]:
    """
    Return a function that converts a record's index and result to a line of `answers.jsonl`.

    LLaVA draws `answer_id` at random. Here it follows from model, record and answer, so that equal runs write equal
    files. A record without an answer has an empty `text`, and its error is in `metadata`.

    Args:
        entries: Records of the run.
        model_id: Name of the model.
    """

    def convert(index: int, result: Result) -> dict[str, Any]:
        text = result.get("answer", "")
        return {
            "question_id": result["id"],
            "prompt": _prompt(entries[index]),
            "text": text,
            "answer_id": uuid5(NAMESPACE_OID, f"{model_id}\n{index}\n{result['id']}\n{text}").hex,
            "model_id": model_id,
            "metadata": {"error": result["error"]} if "error" in result else {},
        }

    return convert


def _prompt(entry: Entry) -> str:
    """Return the question of a record without marks, or an empty text if it cannot be read."""
    try:
        question = parse_question(entry, "")
    except RecordProblem:
        return ""
    return question.messages[-1]["content"].replace(IMAGE_TOKEN, "").strip()
