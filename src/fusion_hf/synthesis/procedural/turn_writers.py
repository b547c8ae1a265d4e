"""Turns of each category about a drawn scene: what a language model would write."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fusion_hf.drawing.drawn_questions import plural
from fusion_hf.synthesis.category import Category
from fusion_hf.synthesis.choices import Choice
from fusion_hf.synthesis.procedural.scene_pairs import CHANGES, ScenePair
from fusion_hf.synthesis.procedural.scene_questions import (
    SceneQuestion,
    choose,
    colors,
    counts,
    distractors,
    everything,
    kinds,
    places,
    presences,
    relations,
    sentence_case,
    text_colors,
    texts,
)
from fusion_hf.synthesis.procedural.scenes import (
    Scene,
    counted_scene,
    listing,
    pair_scene,
    place_of,
    reasoning_scene,
    shapes_scene,
    sign_scene,
    spoken,
    writing_scene,
)
from fusion_hf.synthesis.synth_record import RecordTurn

SENTENCE_SHARE = 0.3  # of short answers are sentences
CAPTION_SHARE = 0.3  # of alignment records begin with a caption
MOST_OPTIONS = 4
CAPTION_FORMS = (
    "Describe the picture in one sentence.",
    "What does the picture show?",
    "Give a short caption for the picture.",
)
DETAIL_FORMS = (
    "Describe the picture in detail.",
    "What can be seen in the picture, and where?",
    "Describe the picture for someone who cannot see it.",
)
COMPARISON_FORMS = (
    "Compare the two pictures.",
    "What is the difference between the two pictures, and how can one see it?",
)
BACKGROUNDS = ("", "The background has no pattern.", "The background has one light color all over.")
ARRANGEMENTS = (
    "",
    "The shapes do not touch each other.",
    "No shape covers another one.",
    "The background between them is plain and light.",
)
ARRANGEMENT_FORMS = ("How is the picture arranged?", "Explain where everything is in the picture.")


def any_scene(rng: random.Random) -> Scene:
    """Draw shapes to be counted, a pair, or a sign."""
    maker: Callable[[random.Random], Scene] = rng.choice((counted_scene, pair_scene, sign_scene))
    return maker(rng)


SCENES: dict[str, Callable[[random.Random], Scene]] = {
    "SynthColor": partial(shapes_scene, least=2, colors=2),
    "SynthCount": counted_scene,
    "SynthSpatial": pair_scene,
    "SynthText": writing_scene,
    "SynthConvLong": partial(shapes_scene, least=3),
    "SynthReasoning": reasoning_scene,
    "SynthTextQA": sign_scene,
}  # any scene for others

FOCUS: dict[str, Callable[[Scene, random.Random], list[SceneQuestion]]] = {
    "SynthColor": colors,
    "SynthCount": lambda scene, rng: [],  # beside the numbers, which all categories ask for where they were drawn
    "SynthSpatial": lambda scene, rng: [*relations(scene), *places(scene)],
    "SynthText": lambda scene, rng: [*texts(scene, rng), *text_colors(scene, rng)],
    "SynthTextQA": lambda scene, rng: [*texts(scene, rng), *colors(scene, rng), *kinds(scene), *presences(scene, rng)],
}  # everything for others


def write_turns(category: Category, scene: Scene, rng: random.Random) -> tuple[RecordTurn, ...]:
    """Write turns about one image, as many as the category allows and the scene has questions for."""
    if category.name == "SynthScene":
        return (_overview(scene, rng),)
    if category.name == "SynthReasoning":
        return (_reasoned(scene, rng),)
    if category.name == "SynthConvLong":
        return _long(scene, rng)
    candidates = FOCUS.get(category.name, everything)(scene, rng)
    if category.name == "SynthMultiChoice":
        candidates = [asked for asked in candidates if asked.about]
    amount = rng.randint(category.turns.least, category.turns.most)
    chosen = choose(candidates, amount, rng, preferred=counts(scene, rng))
    if category.name == "SynthMultiChoice":
        return tuple(_choice(asked, scene, rng) for asked in chosen)
    return tuple(_answered(asked, rng) for asked in chosen)


def _answered(asked: SceneQuestion, rng: random.Random) -> RecordTurn:
    return RecordTurn(asked.text, asked.sentence if rng.random() < SENTENCE_SHARE else asked.short)


def _choice(asked: SceneQuestion, scene: Scene, rng: random.Random) -> RecordTurn:
    right = asked.short.strip('"').removesuffix(" it").removeprefix("A ").removeprefix("The ").lower()
    options = distractors(asked, scene, MOST_OPTIONS - 1, rng)
    place = rng.randrange(len(options) + 1)
    options.insert(place, right)
    return Choice(asked.text, tuple(sentence_case(option) for option in options), place).turn()


def _overview(scene: Scene, rng: random.Random) -> RecordTurn:
    if rng.random() < CAPTION_SHARE:
        return RecordTurn(rng.choice(CAPTION_FORMS), sentence_case(f"The picture shows {scene.caption()}"))
    return RecordTurn(rng.choice(DETAIL_FORMS), scene.description())


def _long(scene: Scene, rng: random.Random) -> tuple[RecordTurn, ...]:
    """A description of all, and a walk along the rows."""
    ordered = sorted(scene.shapes, key=lambda shape: shape.center[::-1])
    steps = [f"a {shape.name} {place_of(shape)}" for shape in ordered]
    walk = f"Going from the top of the picture to the bottom, one comes across {listing(steps)}. "
    turns = [
        RecordTurn(rng.choice(DETAIL_FORMS), f"{scene.description()} {rng.choice(BACKGROUNDS)}".rstrip()),
        RecordTurn(rng.choice(ARRANGEMENT_FORMS), f"{walk}{rng.choice(ARRANGEMENTS)}".rstrip()),
    ]
    rng.shuffle(turns)
    return tuple(turns)


def _reasoned(scene: Scene, rng: random.Random) -> RecordTurn:
    """A difference of two numbers, or a number after some are taken away, as the scene was drawn for."""
    numbers = [(kind, scene.kinds[kind.removesuffix("s")]) for kind in scene.counted]
    steps = [_there_are(count, kind.removesuffix("s")) for kind, count in numbers]
    if len(numbers) == 2:
        (more, minuend), (fewer, subtrahend) = numbers
        question = f"How many more {more} than {fewer} are there?"
    else:
        ((taken, subtrahend),) = numbers
        minuend = len(scene.shapes)
        question = f"If all {taken} were taken away, how many shapes would be left in the picture?"
        steps.insert(0, _there_are(minuend, "shape", " in all"))
    left = minuend - subtrahend
    steps.append(f"{sentence_case(spoken(minuend))} minus {spoken(subtrahend)} is {spoken(left)}.")
    return RecordTurn(question, "\n".join([*steps, f"Answer: {left}"]))


def _there_are(count: int, noun: str, where: str = "") -> str:
    return f"There {'is' if count == 1 else 'are'} {_amount(count, noun)}{where}."


def write_pair_turns(category: Category, pair: ScenePair, rng: random.Random) -> tuple[RecordTurn, ...]:
    """Write turns about two images side by side."""
    difference = _difference(pair)
    if category.name == "SynthContrastLong":
        texts = (replace(scene, wording=0).description() for scene in (pair.first, pair.second))
        left, right = (text[:1].lower() + text[1:] for text in texts)
        answer = f"{difference} In the left picture, {left} In the right picture, {right}"
        return (RecordTurn(rng.choice(COMPARISON_FORMS), answer),)
    # As many pairs with equal numbers as with others are asked for them: else the question would tell the answer.
    counted = pair.difference.what == "count" or rng.random() < 1 / (len(CHANGES) - 1)
    turns = _count_turns(pair) if counted else _sides(pair)
    amount = rng.randint(category.turns.least, category.turns.most)
    rest = rng.sample(turns, min(len(turns), amount - 1))
    return (RecordTurn("What differs between the two pictures?", difference), *rest)


def _difference(pair: ScenePair) -> str:
    found = pair.difference
    if found.what == "count":
        left, right = (_amount(int(count), found.subject) for count in (found.first, found.second))
        return f"The left picture has {left}, the right picture has {right}."
    if found.what == "text":
        return f"The left picture says {found.first}, the right picture says {found.second}."
    change = f"{found.first} in the left picture and {found.second} in the right picture"
    return sentence_case(f"{found.subject} is {change}.")


def _amount(count: int, name: str) -> str:
    return f"{spoken(count) if count else 'no'} {plural(name, count)}"


_SIDE_FORMS = {
    "color": "What color is {subject} in the {side} picture?",
    "kind": "What is {subject} in the {side} picture?",
    "place": "Where is {subject} in the {side} picture?",
    "text": "What is written in the {side} picture?",
}


def _sides(pair: ScenePair) -> list[RecordTurn]:
    """How the thing that differs is in either image; numbers have `_count_turns`."""
    found = pair.difference
    form = _SIDE_FORMS[found.what]
    return [
        RecordTurn(form.format(subject=found.subject, side=side), sentence_case(value))
        for side, value in (("left", found.first), ("right", found.second))
    ]


def _count_turns(pair: ScenePair) -> list[RecordTurn]:
    """How many shapes either image has, and whether these are as many."""
    counts = [len(scene.shapes) for scene in (pair.first, pair.second)]
    asked = "How many shapes are there in the {} picture?"
    return [
        *(RecordTurn(asked.format(side), str(count)) for side, count in zip(("left", "right"), counts, strict=True)),
        RecordTurn("Do both pictures have the same number of shapes?", "Yes" if counts[0] == counts[1] else "No"),
    ]
