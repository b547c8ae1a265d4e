"""A few made-up rows of each benchmark in its schema, with drawn images, as Parquet files."""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageDraw

from fusion_hf.evaluation.benchmark_data import folder_of
from fusion_hf.evaluation.benchmarks import (
    BENCHMARKS,
    EITHER,
    IMAGE,
    IMAGES,
    INTEGER,
    NUMBER,
    OPTIONAL,
    RECORD,
    TEXT,
    TEXTS,
    VARIANTS,
    Benchmark,
)
from fusion_hf.evaluation.tasks.local_rows import IMAGE_TYPE

PROMPTS_FILE = Path(__file__).parents[1] / "fixtures/evaluation/prompts.json"
SIDE = 48  # pixels
RED, BLUE = "#c02020", "#2040c0"
LETTERS = ["red", "blue", "green", "white"]

TYPES = {
    TEXT: pa.string(),
    TEXTS: pa.list_(pa.string()),
    INTEGER: pa.int64(),
    NUMBER: pa.float64(),
    IMAGE: IMAGE_TYPE,
    IMAGES: pa.list_(IMAGE_TYPE),
}


def png(color: str) -> bytes:
    """A square of a colour on white."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).rectangle((8, 8, 40, 40), fill=color)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def drawn(color: str) -> dict[str, Any]:
    """An image in a column of images."""
    return {"bytes": png(color), "path": "square.png"}


QUESTION = "what color is the square?"
BOTH = ((RED, "red"), (BLUE, "blue"))


def _mmbench(question: str, hint: str, options: list[str]) -> list[dict[str, Any]]:
    names = {"source": "drawn", "split": "dev", "category": "color", "L2-category": "perception"}
    rows = [
        {"index": number, "image": drawn(color), "question": question, "hint": hint, "answer": "AB"[number], **names}
        for number, (color, _) in enumerate(BOTH)
    ]
    rows[1]["hint"] = "nan"
    return [{**row, **dict(zip("ABCD", options, strict=True))} for row in rows]


def _yes_no(**fields: Any) -> list[dict[str, Any]]:
    """A pair of questions about an image, answered by yes and no."""
    asked = (
        ("Is the square red? Please answer yes or no.", "Yes"),
        ("Is the square blue? Please answer yes or no.", "No"),
    )
    return [{"image": drawn(RED), "question": question, "answer": answer, **fields} for question, answer in asked]


def _seed_rows() -> list[dict[str, Any]]:
    choices = {f"choice_{letter}": text for letter, text in zip("abcd", LETTERS, strict=True)}
    rows = [
        {"question_id": str(number), "image": [drawn(color)], "question": QUESTION, "answer": letter, **choices}
        for number, ((color, _), letter) in enumerate(zip(BOTH, "AB", strict=True))
    ]
    video = {**rows[0], "question_id": "2", "image": [drawn(RED), drawn(BLUE)], "data_type": "video"}
    return [video, *({**row, "data_type": "image"} for row in rows)]


def _mathvista_rows() -> list[dict[str, Any]]:
    about = dict.fromkeys(("language", "source", "category", "task", "context", "grade"), "drawn")
    about = {**about, "split": "testmini", "skills": ["counting"]}
    choice = {"question": QUESTION, "choices": LETTERS, "answer": "red", "question_type": "multi_choice"}
    count = {
        "question": "how wide is it?",
        "unit": "cm",
        "answer": "1.5",
        "question_type": "free_form",
        "precision": 1.0,
    }
    return [
        {
            "pid": "1",
            "decoded_image": drawn(RED),
            "query": QUESTION,
            "answer_type": "text",
            **choice,
            "metadata": about,
        },
        {
            "pid": "2",
            "decoded_image": drawn(BLUE),
            "query": "width",
            "answer_type": "float",
            **count,
            "metadata": about,
        },
    ]


def _mmmu_rows() -> list[dict[str, Any]]:
    choice = {
        "id": "validation_Art_1",
        "question": "Which color has <image 1>, unlike <image 2>?",
        "options": repr(LETTERS),
        "answer": "A",
        "question_type": "multiple-choice",
        "image_1": drawn(RED),
        "image_2": drawn(BLUE),
    }
    open_ended = {
        "id": "validation_Math_2",
        "question": "How many squares does <image 1> show?",
        "options": "[]",
        "answer": "1",
        "question_type": "open",
        "image_1": drawn(BLUE),
    }
    return [choice, open_ended]


def _hallusion_rows() -> list[dict[str, Any]]:
    rows = [
        {
            "image": drawn(color),
            "question": "Is the square red? Answer with yes or no.",
            "gt_answer_details": f"The square is {name}.",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": str(number),
            "question_id": "0",
            "category": "VD",
            "subcategory": "figure",
        }
        for number, (color, name) in enumerate(BOTH)
    ]
    return [*rows, {**rows[0], "category": "VS", "subcategory": "chart"}]


def _llava_rows() -> list[dict[str, Any]]:
    return [
        {
            "question_id": number,
            "image": drawn(RED),
            "question": "What does the picture show?",
            "gpt_answer": "A red square on white.",
            "caption": ["A red square."],
            "category": category,
        }
        for number, category in enumerate(("conv", "detail", "complex"))
    ]


def _pairs(**fields: Any) -> list[dict[str, Any]]:
    """A question about each of two images, answered by a word."""
    return [{"image": drawn(color), "question": QUESTION, "answer": word, **fields} for color, word in BOTH]


def _mmstar_rows() -> list[dict[str, Any]]:
    kinds = {
        "coarse perception": "image emotion",
        "fine-grained perception": "recognition",
        "instance reasoning": "single-instance reasoning",
        "logical reasoning": "common reasoning",
        "science & technology": "geography & earth science & agriculture",
        "math": "geometry",
    }
    asked = f"{QUESTION}\nOptions: A: red, B: blue, C: green, D: white"
    return [
        {"index": number, "image": drawn(RED), "question": asked, "answer": "A", "category": kind, "l2_category": part}
        for number, (kind, part) in enumerate(kinds.items())
    ]


def _real_world_rows() -> list[dict[str, Any]]:
    options = ["(A) red", "(B) blue", "(C) green", "(D) white", "(E) This image doesn't feature the color."]
    kinds = ("Perception/OCR with Complex Context", "Reasoning/Monitoring")
    return [
        {
            "index": f"drawn/{number}",
            "bytes": base64.b64encode(png(color)).decode(),
            "question": QUESTION,
            "multi-choice options": options,
            "answer": letter,
            "category": kind,
            "l2-category": "color",
        }
        for number, ((color, _), letter, kind) in enumerate(zip(BOTH, "AB", kinds, strict=True))
    ]


def _cv_bench_rows() -> list[dict[str, Any]]:
    options = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", LETTERS, strict=True))
    fields = {
        "prompt": f"{QUESTION} Select from the following choices.\n{options}",
        "choices": LETTERS,
        "task": "Count",
    }
    return [
        {"idx": 0, "image": drawn(RED), "answer": "(A)", "type": "2D", "source": "ADE20K", **fields},
        {"idx": 1, "image": drawn(BLUE), "answer": "(B)", "type": "3D", "source": "Omni3D", **fields},
    ]


def _mmvp_rows() -> list[dict[str, Any]]:
    """A pair, and one of the pairs whose labels lmms-eval's copy corrects."""
    asked = {"Question": "Is the square red or blue?", "Options": "(a) Red (b) Blue"}
    labels = {1: "(a)", 2: "(b)", 99: "(b)", 100: "(a)"}
    return [
        {"Index": index, "image": drawn(RED if label == "(a)" else BLUE), "Correct Answer": label, **asked}
        for index, label in labels.items()
    ]


def _science_rows() -> list[dict[str, Any]]:
    row = {"image": drawn(RED), "question": QUESTION, "choices": LETTERS, "answer": 0, "hint": "Squares have a color."}
    return [row, {**row, "hint": ""}]


ANSWERS = ["red"] * 10

ROWS: dict[str, list[dict[str, Any]]] = {
    "mmbench_en": _mmbench(QUESTION, "Look at the square.", [*LETTERS[:3], None]),
    "mmbench_cn": _mmbench("正方形是什么颜色的？", "看这个正方形。", ["红色", "蓝色", "绿色", "白色"]),
    "vizwiz_vqa": [
        {"question_id": "drawn_1", "image": drawn(RED), "question": "What Color is it?", "answers": ANSWERS}
    ],
    "pope": _yes_no(question_id="1"),
    "mmvet": [
        {
            "question_id": "v1_0",
            "image": drawn(RED),
            "question": QUESTION,
            "answer": "red<OR>dark red",
            "capability": "rec,ocr",
        }
    ],
    "mme": [
        *_yes_no(question_id="color/1.png", category="color"),
        *_yes_no(question_id="2", category="code_reasoning"),
    ],
    "seedbench": _seed_rows(),
    "hallusion_bench_image": _hallusion_rows(),
    "llava_in_the_wild": _llava_rows(),
    "mmstar": _mmstar_rows(),
    "mmerealworld": _real_world_rows(),
    "realworldqa": [
        {
            "image": drawn(RED),
            "question": f"{QUESTION}\nA. red\nB. blue\n"
            "Please answer directly with only the letter of the correct option and nothing else.",
            "answer": "A",
        }
    ],
    "cv_bench": _cv_bench_rows(),
    "mmvp": _mmvp_rows(),
    "ai2d": [{"image": drawn(RED), "question": QUESTION, "options": LETTERS, "answer": "0"}],
    "mathvista": _mathvista_rows(),
    "mmmu_val": _mmmu_rows(),
    "scienceqa_img": _science_rows(),
    "textvqa_val": [
        {
            "question_id": 1,
            "image": drawn(RED),
            "question": "what does the Sign say?",
            "answers": ANSWERS,
            "ocr_tokens": ["RED", "stop"],
        }
    ],
    "ocrbench": [
        {
            "image": drawn(RED),
            "question": "what is written in the image?",
            "answer": ["red"],
            "dataset": "IIIT5K",
            "question_type": "Regular Text Recognition",
        }
    ],
    "chartqa": [*_pairs(type="human_test"), *_pairs(type="augmented_test")],
    "docvqa": [
        {"questionId": "7", "image": drawn(RED), "question": "What is the Date?", "answers": ["red", "dark red"]}
    ],
}


SUBMITTED = [name for name, variant in VARIANTS.items() if variant.is_submitted]
FIELDS_OF_TWO = {"vizwiz_vqa": ("question_id", "drawn_0"), "docvqa": ("questionId", "3")}


def submitted_rows(name: str) -> list[dict[str, Any]]:
    """A few rows of a test set: without answers, and not in the order of what names them."""
    variant = VARIANTS[name]
    of = folder_of(variant)
    hidden = [column for column, kind in variant.schema.items() if kind != BENCHMARKS[of].schema[column]]
    rows = [{**row, **dict.fromkeys(hidden)} for row in ROWS[of]]
    if of not in FIELDS_OF_TWO:
        return rows[::-1]
    column, other = FIELDS_OF_TWO[of]
    return [*rows, {**rows[0], column: other, "image": drawn(BLUE)}]


def arrow_schema(benchmark: Benchmark, rows: Iterable[dict[str, Any]]) -> pa.Schema:
    """Of the columns' kinds; where several are allowed, of the values' own."""
    fields = []
    for column, kind in benchmark.schema.items():
        open_kind = EITHER in kind or kind == RECORD
        found = pa.infer_type([row.get(column) for row in rows]) if open_kind else TYPES[kind.removesuffix(OPTIONAL)]
        fields.append((column, found))
    return pa.schema(fields)


def write_rows(benchmark: Benchmark, root: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write rows, by default the made-up ones, where `prepare_tasks` looks for them; returns the file."""
    rows = ROWS[benchmark.name] if rows is None else rows
    (split,) = benchmark.splits
    table = pa.Table.from_pylist(rows, schema=arrow_schema(benchmark, rows))
    file = root / folder_of(benchmark) / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, file)
    return file


def recorded_prompts() -> dict[str, dict[str, list[str]]]:
    """Whose prompts -> benchmark -> the texts and images (`<image>`) of its first made-up row that is asked."""
    return json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))


def prompt_blocks(task: Any, row: dict[str, Any]) -> list[str]:
    """What a task of lmms-eval's chat kind asks about a row: its texts, and `<image>` for each image, in order."""
    blocks = [block for message in task.doc_to_messages(row) for block in message["content"]]
    return [block["text"] if block["type"] == "text" else "<image>" for block in blocks]
