"""The test questions of easy-vqa as a task of lmms-eval, made from the package `easy-vqa`."""

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
    Write the task and its questions into a folder.

    Args:
        folder: the folder.
        task_name: the name of the task.

    Returns:
        The path of the task's YAML file.

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
    """
    Open the image of a question.

    Args:
        doc: the row of the question.
    """
    with Image.open(doc["image"]) as image:
        return [image.convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """
    Score an answer by exact match, for all questions and separately for yes/no questions and the others.

    Args:
        doc: the row of the question.
        results: the answer, as the only entry.
    """
    hit = float(results[0].strip() == doc["answer"])
    kind = "exact_match_yes_no" if doc["answer"] in YES_NO else "exact_match_not_yes_no"
    return {"exact_match": hit, kind: hit}
