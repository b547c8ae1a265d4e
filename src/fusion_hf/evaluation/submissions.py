"""Answers for benchmarks that a server scores, in the file that the server takes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fusion_hf.common.outputs import atomic_file
from fusion_hf.evaluation.benchmarks import Benchmark

Row = Mapping[str, Any]
Write = Callable[[list[dict[str, Any]], BinaryIO], None]
OPTIONS = "ABCD"
NO_OPTION = (None, "nan")  # how the data of MMBench write it


class SubmissionIncomplete(ValueError):
    """Not every question of the test set has an answer: the server would refuse the file."""


@dataclass(frozen=True)
class FileFormat:
    """
    What a server takes.

    Args:
        suffix: of the file.
        fields: the file's field or column -> the key of lmms-eval's row.
        question, answer: the fields that name the question, and that answer it.
        write: writes rows of the fields into a file.
    """

    suffix: str
    fields: Mapping[str, str]
    question: str
    answer: str
    write: Write


def _write_json(rows: list[dict[str, Any]], stream: BinaryIO) -> None:
    stream.write(json.dumps(rows).encode())


def _write_table(rows: list[dict[str, Any]], stream: BinaryIO) -> None:
    """A workbook of one sheet; its first row has the columns' names. Where there is no option, the cell is empty."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook()
    sheet = book.active
    sheet.append(list(rows[0]))
    for number, row in enumerate(rows, start=2):
        for place, (column, value) in enumerate(row.items(), start=1):
            if column in OPTIONS and value in NO_OPTION:
                continue
            if not isinstance(value, str):
                sheet.cell(number, place, value)
                continue
            cell = sheet.cell(number, place, ILLEGAL_CHARACTERS_RE.sub("", value))
            cell.data_type = "s"  # a text that begins with "=" is no formula
    book.save(stream)


_MMBENCH = FileFormat(
    ".xlsx",
    {
        **{name: name for name in ("index", "question", *OPTIONS, "prediction", "category")},
        "l2_category": "L2-category",
    },
    question="index",
    answer="prediction",
    write=_write_table,
)

FORMATS: dict[str, FileFormat] = {
    "mmbench_en_test": _MMBENCH,
    "mmbench_cn_test": _MMBENCH,
    "vizwiz_vqa_test": FileFormat(".json", {"image": "image", "answer": "answer"}, "image", "answer", _write_json),
    "docvqa_test": FileFormat(
        ".json", {"questionId": "questionId", "answer": "answer"}, "questionId", "answer", _write_json
    ),
}


def submission_file(benchmark: Benchmark, folder: Path) -> Path:
    """Name the file that `write_submission` writes."""
    return folder / f"{benchmark.name}{FORMATS[benchmark.name].suffix}"


def write_submission(benchmark: Benchmark, rows: Sequence[Row], n_total: int, folder: Path) -> Path:
    """
    Write the answers into `folder`, all of them or no file.

    Args:
        rows: lmms-eval's `submission` of each question, in the order of the data.
        n_total: questions of the test set.

    Raises:
        SubmissionIncomplete: if a question has no answer, or there are fewer or more answers than questions.
    """
    form = FORMATS[benchmark.name]
    content = [{name: row.get(key) for name, key in form.fields.items()} for row in rows]
    unanswered = [row[form.question] for row in content if row[form.answer] is None]
    if unanswered:
        raise SubmissionIncomplete(
            f"{len(unanswered)} of {n_total} questions have no answer, the first is {form.question} {unanswered[0]}; "
            "no submission is written."
        )
    if not content or len(content) != n_total:
        raise SubmissionIncomplete(f"{len(content)} answers to {n_total} questions; no submission is written.")
    path = submission_file(benchmark, folder)
    with atomic_file(path) as stream:
        form.write(content, stream)
    return path
