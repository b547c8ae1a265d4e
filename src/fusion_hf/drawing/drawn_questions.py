"""Questions and captions for the images of `fusion-nano`.

FUSION's tower reads all questions of a conversation (the instruct text), so a question must not reveal the answer to
another one: "what is the blue shape?" answers "what color is the shape?". Therefore each question stores the attribute
that it asks for and those that it reveals.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

from fusion_hf.drawing.drawn_images import COLORS, SHAPES, DrawnImage, DrawnShape, direction

SHAPE_FORMS = ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")
SHAPE_OF_FORM = "what is the {color} shape?"
COLOR_FORMS = ("what color is the {kind}?", "what is the color of the {kind}?")
PRESENCE_FORMS = ("is there {a} in the image?", "is there {a}?", "does the image contain {a}?", "is {a} present?")
ABSENCE_FORMS = (
    "is there not {a} in the image?",
    "is there not {a}?",
    "does the image not contain {a}?",
    "is no {bare} present?",
)
COUNT_FORMS = ("how many {plural} are there?", "how many {plural} are in the image?")
RELATION_FORM = "where is the {seen}, seen from the {reference}?"
WORD_FORMS = ("what word is written?", "which word is in the image?", "what does the picture say?")

YES_NO = ("yes", "no")
YES_NO_QUESTIONS = 4  # number per image that resembles those of easy-vqa
# Colours are learned long before words and relations.
WORD_COLOR_SHARE = 0.25  # share of word images with a question about the colour
TRUE_CANDIDATE_SHARE = 0.5  # share of yes/no questions that propose the true value
RELATION_PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

_VALUE = re.compile(rf"\b({'|'.join((*SHAPES, *COLORS))})\b")
_ATTRIBUTES = {**dict.fromkeys(SHAPES, "shape"), **dict.fromkeys(COLORS, "color")}
_NEGATION = re.compile(r"\b(not|no)\b")


@dataclass(frozen=True)
class DrawnQuestion:
    """
    A question with its answer, the attribute that it asks for, and the attributes that it reveals.

    `candidate` is the value that a yes/no question proposes ("is there a red shape?"), or None.
    """

    text: str
    answer: str
    asks: str
    names: frozenset[str] = frozenset()
    candidate: str | None = None


def compatible(first: DrawnQuestion, second: DrawnQuestion) -> bool:
    """
    Return whether neither question reveals what the other one asks for.

    Two questions about the same attribute are compatible only if they are yes/no questions that propose different
    values. With the same value, the second answer would follow from the first.

    Args:
        first, second: The questions.
    """
    if first.asks in second.names or second.asks in first.names:
        return False
    if first.asks != second.asks:
        return True
    return None not in (first.candidate, second.candidate) and first.candidate != second.candidate


def parse_easy_vqa(text: str, answer: str) -> DrawnQuestion:
    """
    Parse a question of easy-vqa.

    Args:
        text: Text of the question.
        answer: Its answer.

    Returns:
        The question with the attributes that it asks for and reveals.

    Raises:
        ValueError: If the question has an unknown form.
    """
    values = _VALUE.findall(text)
    if answer in YES_NO and len(values) == 1:
        return DrawnQuestion(text, answer, _ATTRIBUTES[values[0]], candidate=values[0])
    if answer in _ATTRIBUTES:
        return DrawnQuestion(text, answer, _ATTRIBUTES[answer], frozenset(_ATTRIBUTES[value] for value in values))
    raise ValueError(f"A question must have one of the forms of easy-vqa, got {text!r} with the answer {answer!r}.")


def drawn_questions(spec: DrawnImage, rng: random.Random) -> tuple[DrawnQuestion, ...]:
    """
    Draw questions about an image.

    Args:
        spec: The image.
        rng: Random generator.
    """
    if spec.word is not None:
        word = DrawnQuestion(rng.choice(WORD_FORMS), spec.word.text, "word")
        color = DrawnQuestion(rng.choice(COLOR_FORMS).format(kind="word"), spec.word.color, "color")
        return (word, color) if rng.random() < WORD_COLOR_SHARE else (word,)
    if spec.category == "count":
        return _count_questions(spec.shapes, rng)
    if spec.category == "spatial":
        return _spatial_questions(spec.shapes, rng)
    return _single_questions(spec.shapes[0], rng)


def drawn_caption(spec: DrawnImage) -> str:
    """Describe an image in one sentence."""
    if spec.word is not None:
        return f'the {spec.word.color} word "{spec.word.text}".'
    if spec.category == "spatial":
        first, second = spec.shapes
        return f"a {first.name} {RELATION_PHRASES[_relation(first, second)]} a {second.name}."
    if spec.category == "count":
        return _count_caption(spec.shapes)
    return f"a {spec.shapes[0].name}."


def easy_vqa_caption(questions: tuple[DrawnQuestion, ...]) -> str | None:
    """Write the caption that follows from questions and answers about an easy-vqa image, or return None."""
    known: dict[str, str] = {}
    for question in questions:
        if question.candidate is None:
            known[question.asks] = question.answer
            known |= {_ATTRIBUTES[value]: value for value in _VALUE.findall(question.text)}
        elif (question.answer == "yes") != bool(_NEGATION.search(question.text)):
            known[question.asks] = question.candidate
    if known.keys() >= {"color", "shape"}:
        return f"a {known['color']} {known['shape']}."
    return None


def casual(text: str, rng: random.Random, share: float) -> str:
    """
    Randomly write the first letter of a question as a capital, and omit its question mark.

    Args:
        text: The question.
        rng: Random generator.
        share: Probability of each change.
    """
    if rng.random() < share:
        text = text[0].upper() + text[1:]
    return text.removesuffix("?") if rng.random() < share else text


def _single_questions(shape: DrawnShape, rng: random.Random) -> tuple[DrawnQuestion, ...]:
    """Draw questions in the forms of easy-vqa about an image with a single shape."""
    named = _named_questions(shape, rng)
    questions = [
        DrawnQuestion(rng.choice(SHAPE_FORMS), shape.kind, "shape"),
        DrawnQuestion(rng.choice(COLOR_FORMS).format(kind="shape"), shape.color, "color"),
        rng.choice(named[::-1]),
    ]
    return (*questions, *(_yes_no_question(shape, rng) for _ in range(YES_NO_QUESTIONS)))


def _yes_no_question(shape: DrawnShape, rng: random.Random) -> DrawnQuestion:
    attribute = rng.choice(("shape", "color"))
    truth, values = (shape.kind, SHAPES) if attribute == "shape" else (shape.color, tuple(COLORS))
    others = [value for value in values if value != truth]
    candidate = truth if rng.random() < TRUE_CANDIDATE_SHARE else rng.choice(others)
    bare = candidate if attribute == "shape" else f"{candidate} shape"
    negated = rng.random() < 1 / 2
    text = rng.choice(ABSENCE_FORMS if negated else PRESENCE_FORMS).format(a=f"a {bare}", bare=bare)
    answer = "yes" if (candidate == truth) != negated else "no"
    return DrawnQuestion(text, answer, attribute, candidate=candidate)


def _count_questions(shapes: tuple[DrawnShape, ...], rng: random.Random) -> tuple[DrawnQuestion, ...]:
    """Ask for the number of all shapes, of one kind and of one colour, and for the colour if there is only one."""
    kind, color = rng.choice(shapes).kind, rng.choice(shapes).color
    counted = {
        "shapes": len(shapes),
        f"{kind}s": sum(shape.kind == kind for shape in shapes),
        f"{color} shapes": sum(shape.color == color for shape in shapes),
    }
    gives_away = {"shapes": frozenset(), f"{kind}s": frozenset({"shape"}), f"{color} shapes": frozenset({"color"})}
    questions = [
        DrawnQuestion(rng.choice(COUNT_FORMS).format(plural=plural), str(count), "count", gives_away[plural])
        for plural, count in counted.items()
    ]
    if len({shape.color for shape in shapes}) == 1 and len(shapes) > 1:
        questions.append(DrawnQuestion("what color are the shapes?", color, "color", frozenset({"count"})))
    return tuple(questions)


def _spatial_questions(shapes: tuple[DrawnShape, ...], rng: random.Random) -> tuple[DrawnQuestion, ...]:
    """Ask for the relation in both directions, and for the shape or colour of one of the two."""
    questions = []
    for first, second in (shapes, shapes[::-1]):
        seen, reference, names = rng.choice(
            (
                (first.name, second.name, frozenset({"shape", "color"})),
                (first.kind, second.kind, frozenset({"shape"})),
                (f"{first.color} shape", f"{second.color} shape", frozenset({"color"})),
            )
        )
        text = RELATION_FORM.format(seen=seen, reference=reference)
        questions.append(DrawnQuestion(text, _relation(first, second), "relation", names))
    return (*questions, rng.choice(_named_questions(rng.choice(shapes), rng)))


def _named_questions(shape: DrawnShape, rng: random.Random) -> tuple[DrawnQuestion, DrawnQuestion]:
    """Ask for the colour of a shape by its kind, and for its kind by its colour."""
    color = DrawnQuestion(rng.choice(COLOR_FORMS).format(kind=shape.kind), shape.color, "color", frozenset({"shape"}))
    kind = DrawnQuestion(SHAPE_OF_FORM.format(color=shape.color), shape.kind, "shape", frozenset({"color"}))
    return color, kind


def _relation(seen: DrawnShape, reference: DrawnShape) -> str:
    """Return the `direction` between shapes that are known to be clearly apart."""
    found = direction(seen, reference)
    if found is None:
        raise ValueError(f"The {seen.name} and the {reference.name} must be clearly apart along one axis.")
    return found


def _count_caption(shapes: tuple[DrawnShape, ...]) -> str:
    """Write a caption such as "3 circles.", "2 red triangles." or "4 shapes: 1 circle, 3 rectangles."."""
    kinds = Counter(shape.kind for shape in shapes)
    colors = sorted({shape.color for shape in shapes})
    color = f"{colors[0]} " if len(colors) == 1 else ""
    if len(kinds) == 1:
        return f"{len(shapes)} {color}{plural(shapes[0].kind, len(shapes))}."
    parts = [f"{kinds[kind]} {plural(kind, kinds[kind])}" for kind in SHAPES if kind in kinds]
    return f"{len(shapes)} {color}shapes: {', '.join(parts)}."


def plural(noun: str, count: int) -> str:
    """Return the singular or plural of a noun, such as "circle" or "circles"."""
    return noun if count == 1 else f"{noun}s"
