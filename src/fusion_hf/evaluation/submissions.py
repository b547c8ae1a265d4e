"""Write answers for benchmarks that a server scores, in the file format of the server."""

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
NO_OPTION = (None, "nan")  # as MMBench's data encodes a missing option


class SubmissionIncomplete(ValueError):
    """A question of the test set has no answer, so the server would reject the file."""


@dataclass(frozen=True)
class FileFormat:
    """
    The file format of a server.

    Args:
        suffix: the suffix of the file.
        fields: maps the fields or columns of the file to keys of lmms-eval's rows.
        question: the field that identifies the question.
        answer: the field that holds the answer.
        write: writes rows of the fields to a file.
    """

    suffix: str
    fields: Mapping[str, str]
    question: str
    answer: str
    write: Write


def _write_json(rows: list[dict[str, Any]], stream: BinaryIO) -> None:
    stream.write(json.dumps(rows).encode())


def _write_table(rows: list[dict[str, Any]], stream: BinaryIO) -> None:
    """Write a workbook with one sheet, whose first row has the column names. Missing options are empty cells."""
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
            cell.data_type = "s"  # prevents a text that starts with "=" from becoming a formula
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
    """
    Return the path of the file that `write_submission` writes.

    Args:
        benchmark: the benchmark.
        folder: the folder of the file.
    """
    return folder / f"{benchmark.name}{FORMATS[benchmark.name].suffix}"


def write_submission(benchmark: Benchmark, rows: Sequence[Row], n_total: int, folder: Path) -> Path:
    """
    Write all answers to a file in `folder`, or no file if an answer is missing.

    Args:
        benchmark: the benchmark.
        rows: lmms-eval's `submission` of each question, in the order of the data.
        n_total: the number of questions of the test set.
        folder: the folder of the file.

    Returns:
        The path of the file.

    Raises:
        SubmissionIncomplete: if a question has no answer, or the numbers of answers and questions differ.
    """
    form = FORMATS[benchmark.name]
    content = [{name: row.get(key) for name, key in form.fields.items()} for row in rows]
    unanswered = [row[form.question] for row in content if row[form.answer] is None]
    if unanswered:
        raise SubmissionIncomplete(
            f"{len(unanswered)} of {n_total} questions have no answer. The first one is {form.question} "
            f"{unanswered[0]}. No submission was written."
        )
    if not content or len(content) != n_total:
        raise SubmissionIncomplete(f"There must be {n_total} answers, got {len(content)}. No submission was written.")
    path = submission_file(benchmark, folder)
    with atomic_file(path) as stream:
        form.write(content, stream)
    return path
