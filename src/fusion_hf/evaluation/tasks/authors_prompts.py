"""The authors' prompts where they differ from lmms-eval's. Each function makes the text of a question from a row of
data.
"""

import ast
from typing import Any

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
WORD = "Answer the question using a single word or phrase."
MMBENCH_OPTIONS = "ABCD"
EMPTY = ("", "nan", "none")  # encodings of empty cells

Row = dict[str, Any]


def mmbench_en(row: Row) -> str:
    """Return the question with its hint and options, and the English instruction."""
    return _mmbench(row, LETTER)


def mmbench_cn(row: Row) -> str:
    """Return the question with its hint and options, and the Chinese instruction."""
    return _mmbench(row, LETTER_CN)


def _mmbench(row: Row, ending: str) -> str:
    """Return the hint, the question and its options up to the first empty one, as lines."""
    lines = [] if _is_empty(row["hint"]) else [row["hint"]]
    lines.append(row["question"])
    for letter in MMBENCH_OPTIONS:
        if _is_empty(row.get(letter)):
            break
        lines.append(f"{letter}. {row[letter]}")
    return "\n".join([*lines, ending])


def _is_empty(cell: Any) -> bool:
    return cell is None or str(cell).lower() in EMPTY


def cv_bench(row: Row) -> str:
    """Return the question with its options, which is in the column `prompt`."""
    return f"{row['prompt']}\n{LETTER}"


def mmvp(row: Row) -> str:
    """Return the question and its options, which look like `(a) Open (b) Closed`."""
    return f"{row['Question']} {row['Options']}"


def mmmu(row: Row) -> str:
    """Return the question and its options. The mark `<image 1>` is kept."""
    if row["question_type"] != "multiple-choice":
        return f"{row['question']}\n\n{WORD}"
    options = [f"{chr(ord('A') + place)}. {text}" for place, text in enumerate(ast.literal_eval(row["options"]))]
    return "\n".join([row["question"], *options, "", LETTER])


def textvqa(row: Row) -> str:
    """Return the question and the instruction to answer briefly."""
    return f"{row['question']}\n{WORD}"


def textvqa_ocr(row: Row) -> str:
    """Return the question with the words that an OCR system read in the image."""
    return f"{row['question']}\nReference OCR token: {', '.join(row['ocr_tokens'])}\n{WORD}"
