"""Read the `easy-vqa` data set: 5,000 images of one coloured shape with 48,248 questions and 13 different answers."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class EasyVqaImage:
    """
    One image and its questions.

    Attributes:
        image_id: the number of the image.
        path: the file of the image.
        questions: pairs of question and answer, unchanged and in the order of the file.
    """

    image_id: int
    path: Path
    questions: tuple[tuple[str, str], ...]


def read_easy_vqa(part: Literal["train", "test"]) -> list[EasyVqaImage]:
    """
    Read all images of one part of the data set, sorted by id.

    Args:
        part: `train` or `test`.

    Raises:
        ImportError: if the package `easy-vqa` is not installed.
        ValueError: if `part` is unknown, or a question refers to an image that does not exist.
    """
    try:
        package = importlib.import_module("easy_vqa")
    except ModuleNotFoundError as error:
        raise ImportError("The data set requires the package easy-vqa. Install the extra `train`.") from error
    if part not in ("train", "test"):
        raise ValueError(f"`part` must be train or test, got {part!r}.")
    texts, answers, image_ids = getattr(package, f"get_{part}_questions")()
    paths = getattr(package, f"get_{part}_image_paths")()
    questions: dict[int, list[tuple[str, str]]] = {image_id: [] for image_id in sorted(paths)}
    for text, answer, image_id in zip(texts, answers, image_ids, strict=True):
        if image_id not in questions:
            raise ValueError(
                f"easy-vqa {part}: the question {text!r} is about image {image_id}, which does not exist."
            )
        questions[image_id].append((text, answer))
    return [EasyVqaImage(i, Path(paths[i]), tuple(pairs)) for i, pairs in questions.items()]
