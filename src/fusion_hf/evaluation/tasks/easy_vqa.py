"""easy-vqa's test questions as a task of lmms-eval, from the package `easy-vqa` alone."""

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.data.easy_vqa import read_easy_vqa

TEMPLATE = Path(__file__).with_suffix(".yaml")
ROWS = "test.jsonl"
YES_NO = ("yes", "no")


def prepare_easy_vqa(folder: Path, task_name: str) -> Path:
    """
    Write the task called `task_name` and its questions into `folder`; returns the YAML file.

    Raises:
        InputError: if the package `easy-vqa` is not installed.
    """
    try:
        images = read_easy_vqa("test")
    except ImportError as error:
        raise InputError(f"The task easy_vqa cannot run: {error}") from error
    own = folder / task_name
    own.mkdir(parents=True, exist_ok=True)
    with (own / ROWS).open("w", encoding="utf-8") as stream:
        for image in images:
            for question, answer in image.questions:
                row = {"image": str(image.path.resolve()), "question": question, "answer": answer}
                stream.write(json.dumps(row) + "\n")
    data = {"data_files": {"test": str((own / ROWS).resolve())}, "cache_dir": str((own / "cache").resolve())}
    head = yaml.safe_dump({"task": task_name, "dataset_kwargs": data})
    target = own / f"{task_name}.yaml"
    target.write_text(head + TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    return target


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Open the image of a question."""
    with Image.open(doc["image"]) as image:
        return [image.convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match: of all questions, and of those that are answered by yes or no, or of the others."""
    hit = float(results[0].strip() == doc["answer"])
    kind = "exact_match_yes_no" if doc["answer"] in YES_NO else "exact_match_not_yes_no"
    return {"exact_match": hit, kind: hit}
