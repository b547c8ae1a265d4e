"""Reader of the `easy-vqa` data set (5,000 images of one coloured shape, 48,248 questions, 13 answers)."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class EasyVqaImage:
    """One image with its questions: `questions` are (question, answer) pairs, verbatim and in the file's order."""

    image_id: int
    path: Path
    questions: tuple[tuple[str, str], ...]


def read_easy_vqa(part: Literal["train", "test"]) -> list[EasyVqaImage]:
    """Read all images of one part of the data set, ordered by id.

    Raises:
        ImportError: if the package `easy-vqa` is not installed.
        ValueError: if `part` is unknown or a question names an image that does not exist.
    """
    try:
        package = importlib.import_module("easy_vqa")
    except ModuleNotFoundError as error:
        raise ImportError("the data set easy-vqa is not installed: pip install fusion_hf[train]") from error
    if part not in ("train", "test"):
        raise ValueError(f"part is {part!r}, allowed are train, test")
    texts, answers, image_ids = getattr(package, f"get_{part}_questions")()
    paths = getattr(package, f"get_{part}_image_paths")()
    questions: dict[int, list[tuple[str, str]]] = {image_id: [] for image_id in sorted(paths)}
    for text, answer, image_id in zip(texts, answers, image_ids, strict=True):
        if image_id not in questions:
            raise ValueError(f"easy-vqa {part}: question {text!r} is about image {image_id}, which does not exist")
        questions[image_id].append((text, answer))
    return [EasyVqaImage(i, Path(paths[i]), tuple(pairs)) for i, pairs in questions.items()]
