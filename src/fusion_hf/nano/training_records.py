"""Training and evaluation records of `fusion-nano`: captions, and conversations with up to three questions."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from fusion_hf.data.easy_vqa import EasyVqaImage, read_easy_vqa
from fusion_hf.data.record_parsing import llava_record
from fusion_hf.drawing.drawn_images import CATEGORIES, Category, DrawnImage, Split, draw_spec
from fusion_hf.drawing.drawn_questions import (
    DrawnQuestion,
    casual,
    compatible,
    drawn_caption,
    drawn_questions,
    easy_vqa_caption,
    parse_easy_vqa,
)

Stage = Literal["1", "1.5", "2"]
STAGES: tuple[Stage, ...] = ("1", "1.5", "2")

VALIDATION_SHARE = 0.1  # share of easy-vqa's training images
SPLIT_SEED = 20250414
MAX_TURNS = 3
TURN_WEIGHTS = (0.6, 0.25, 0.15)  # weights of conversations with at most one, two, three turns
CASUAL_SHARE = 0.1  # share of questions in stage 2 with a capital letter, and share without a question mark
OWN_ATTRIBUTES = {"count": "count", "spatial": "relation", "text": "word"}
CAPTION_PROMPTS = ("describe the picture.", "describe the image.", "what is in the picture?")


@dataclass(frozen=True)
class DescribedImage:
    """An image with questions about it and a caption. `key` identifies it across splits."""

    image: Path | DrawnImage
    category: str
    key: str
    questions: tuple[DrawnQuestion, ...]
    caption: str | None


@dataclass(frozen=True)
class NanoRecord:
    """One conversation about one image. `turns` are (question, answer) pairs."""

    image: Path | DrawnImage
    turns: tuple[tuple[str, str], ...]
    category: str
    key: str

    def open_image(self) -> Image.Image:
        """Open the image in mode RGB, with 64 x 64 pixels."""
        if isinstance(self.image, DrawnImage):
            return self.image.render()
        with Image.open(self.image) as image:
            return image.convert("RGB")

    def to_llava(self, image: str | None = None) -> dict[str, Any]:
        """
        Convert to a record in LLaVA's format.

        Args:
            image: File name of the image. By default, the record contains the PIL image.
        """
        return llava_record(self.key, self.open_image() if image is None else image, self.turns)


@dataclass(frozen=True)
class DrawnMixture:
    """Numbers of drawn images of each category in a stage, and the share of easy-vqa's images that is used."""

    single: int = 6000
    count: int = 5000
    spatial: int = 5000
    text: int = 8000
    easy_vqa: float = 1.0


def stage_records(
    stage: Stage,
    split: Literal["train", "validation"] = "train",
    seed: int | str = 0,
    mixture: DrawnMixture | None = None,
) -> list[NanoRecord]:
    """
    Create the shuffled records of a training stage.

    Stage 1 has one caption per image. Stage 1.5 has one caption and one conversation per image. Stage 2 has
    conversations with all questions about all images. Each stage draws its own images.

    Args:
        stage: A stage in `STAGES`.
        split: Split of the images.
        seed: Seed of the images and the order.
        mixture: Numbers of images.

    Raises:
        ValueError: If the stage or the split is unknown.
    """
    if stage not in STAGES:
        raise ValueError(f"`stage` must be one of {', '.join(STAGES)}, got {stage!r}.")
    mixture = mixture or DrawnMixture()
    rng = random.Random(f"records/{stage}/{split}/{seed}")
    real = easy_vqa_images(split)
    images = rng.sample(real, round(mixture.easy_vqa * len(real)))
    images += draw_images(split, mixture, seed=f"stage {stage}/{seed}")
    records: list[NanoRecord] = []
    if stage != "2":
        records += caption_records(images, rng)
    if stage != "1":
        conversations_per_image = 1 if stage == "1.5" else None
        records += question_records(images, rng, conversations_per_image)
    rng.shuffle(records)
    return records


def evaluation_records(split: Literal["train", "validation"], seed: int = 0, drawn: int = 500) -> list[NanoRecord]:
    """
    Create single questions for choosing settings.

    Args:
        split: Split of easy-vqa, all of whose questions are used.
        seed: Seed of the drawn images.
        drawn: Number of images of each other category.
    """
    return _single_questions(easy_vqa_images(split) + _drawn_for_evaluation(split, seed, drawn))


def test_records(seed: int = 0, drawn: int = 1000) -> list[NanoRecord]:
    """
    Create single questions for the final figures, which must not be used to choose settings.

    Args:
        seed: Seed of the drawn images.
        drawn: Number of images of each category besides easy-vqa's test questions.
    """
    easy_vqa = [_easy_vqa_image(image, "test") for image in read_easy_vqa("test")]
    return _single_questions(easy_vqa + _drawn_for_evaluation("test", seed, drawn))


def easy_vqa_images(split: Literal["train", "validation"]) -> list[DescribedImage]:
    """
    Read easy-vqa's training images. A share of `VALIDATION_SHARE` is the validation split.

    Args:
        split: `"train"` or `"validation"`.

    Raises:
        ValueError: If the split is unknown. Only `test_records` reads the test images.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"`split` must be one of train, validation, got {split!r}.")
    images = read_easy_vqa("train")
    count = round(VALIDATION_SHARE * len(images))
    held_out = set(random.Random(SPLIT_SEED).sample([image.image_id for image in images], count))
    wanted = split == "validation"
    return [_easy_vqa_image(image, "train") for image in images if (image.image_id in held_out) == wanted]


def draw_images(split: Split, mixture: DrawnMixture, seed: int | str) -> list[DescribedImage]:
    """Draw the images of a split. Other seeds give other images."""
    return [
        _drawn_image(category, split, index, seed)
        for category in CATEGORIES
        for index in range(getattr(mixture, category))
    ]


def caption_records(images: Iterable[DescribedImage], rng: random.Random) -> list[NanoRecord]:
    """Create one caption record per image, except for a few images of easy-vqa whose content is unknown."""
    return [
        NanoRecord(image.image, ((rng.choice(CAPTION_PROMPTS), image.caption),), image.category, image.key)
        for image in images
        if image.caption is not None
    ]


def question_records(
    images: Iterable[DescribedImage], rng: random.Random, conversations_per_image: int | None = None
) -> list[NanoRecord]:
    """
    Create conversations about each image.

    Args:
        images: The images.
        rng: Random generator.
        conversations_per_image: Maximum number of conversations per image. By default, all questions are asked.
    """
    records = []
    for image in images:
        for turns in group_turns(image.questions, rng)[:conversations_per_image]:
            texts = tuple((casual(question.text, rng, CASUAL_SHARE), question.answer) for question in turns)
            records.append(NanoRecord(image.image, texts, image.category, image.key))
    return records


def group_turns(questions: Sequence[DrawnQuestion], rng: random.Random) -> list[list[DrawnQuestion]]:
    """Shuffle questions and group them into conversations in which no question reveals the answer to another."""
    waiting = rng.sample(questions, len(questions))
    conversations = []
    while waiting:
        (length,) = rng.choices(range(1, MAX_TURNS + 1), TURN_WEIGHTS)
        turns = [waiting.pop(0)]
        for question in list(waiting):
            if len(turns) < length and all(compatible(question, turn) for turn in turns):
                turns.append(question)
                waiting.remove(question)
        conversations.append(turns)
    return conversations


def training_texts(seed: int = 0, mixture: DrawnMixture | None = None) -> list[str]:
    """Collect all questions, answers and captions in the training records of the three stages, for the tokenizer."""
    records = [record for stage in STAGES for record in stage_records(stage, "train", seed, mixture)]
    return [text for record in records for turn in record.turns for text in turn]


def _drawn_image(category: Category, split: Split, index: int, seed: int | str) -> DescribedImage:
    spec = draw_spec(category, split, index, seed)
    key = f"{category}/{split}/{seed}/{index}"
    questions = drawn_questions(spec, random.Random(f"questions/{key}"))
    return DescribedImage(spec, category, key, questions, drawn_caption(spec))


def _easy_vqa_image(image: EasyVqaImage, part: Literal["train", "test"]) -> DescribedImage:
    questions = tuple(parse_easy_vqa(text, answer) for text, answer in image.questions)
    key = f"easy-vqa/{part}/{image.image_id}"
    return DescribedImage(image.path, "easy-vqa", key, questions, easy_vqa_caption(questions))


def _drawn_for_evaluation(split: Split, seed: int, amount: int) -> list[DescribedImage]:
    """Draw images of the categories that easy-vqa lacks, each with one question of its own category."""
    mixture = DrawnMixture(single=0, count=amount, spatial=amount, text=amount)
    rng = random.Random(f"evaluation/{split}/{seed}")
    chosen = []
    for image in draw_images(split, mixture, seed=f"evaluation/{seed}"):
        own = [question for question in image.questions if question.asks == OWN_ATTRIBUTES[image.category]]
        chosen.append(replace(image, questions=(rng.choice(own),)))
    return chosen


def _single_questions(images: Iterable[DescribedImage]) -> list[NanoRecord]:
    return [
        NanoRecord(image.image, ((question.text, question.answer),), image.category, image.key)
        for image in images
        for question in image.questions
    ]
