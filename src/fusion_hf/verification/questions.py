"""Images and questions for a certificate, drawn or from a file."""

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.common.user_values import is_address
from fusion_hf.data.record_parsing import RecordProblem
from fusion_hf.drawing.drawn_images import CATEGORIES, draw_spec
from fusion_hf.drawing.drawn_questions import drawn_questions
from fusion_hf.inference.question_files import entry_id, parse_question, read_entries
from fusion_hf.model.chat_fusion import IMAGE_TOKEN
from fusion_hf.model.image_limits_fusion import ImageError
from fusion_hf.model.image_opening_fusion import open_image

SIZES = ((64, 64), (400, 300), (1023, 517), (768, 1200))  # smaller and larger than tiles, with other aspect ratios
MAX_QUESTIONS = 64


@dataclass(frozen=True)
class VerificationQuestion:
    """An image in mode RGB and a question about it."""

    image: Image.Image
    text: str


def draw_questions() -> list[VerificationQuestion]:
    """Draw one image of each kind, each in a different size, and return them with their first questions."""
    asked = []
    for category, size in zip(CATEGORIES, SIZES, strict=True):
        spec = draw_spec(category, "test", 0)
        text = drawn_questions(spec, random.Random(0))[0].text
        # the sharpest edges, which reveal differences of resizing filters
        asked.append(VerificationQuestion(spec.render().resize(size, Image.Resampling.NEAREST), text))
    return asked


def read_questions(path: Path) -> list[VerificationQuestion]:
    """
    Read questions in the format of `fusion-hf ask --input`, one question about one image per line.

    Args:
        path: JSONL file.

    Returns:
        The questions with their opened images.

    Raises:
        InputError: If a record has another form. The message names its line.
    """
    entries, root = read_entries(path)
    if len(entries) > MAX_QUESTIONS:
        raise InputError(f"--input: {path} must have at most {MAX_QUESTIONS} records, got {len(entries)}.")
    asked = []
    for index, entry in enumerate(entries):
        place = f"--input: {path}, line {entry.line}"
        try:
            question = parse_question(entry, entry_id(entry, index))
        except RecordProblem as error:
            raise InputError(f"{place}: {error}.") from error
        if len(question.messages) != 1 or not isinstance(question.image, str) or is_address(question.image):
            raise InputError(f"{place}: a record must have one question about one image file, without earlier turns.")
        try:
            image = open_image(root / question.image)
        except ImageError as error:
            raise InputError(f"{place}: {question.image} cannot be used: {error.reason}.") from error
        asked.append(VerificationQuestion(image, question.messages[0]["content"].replace(IMAGE_TOKEN, "").strip()))
    return asked
