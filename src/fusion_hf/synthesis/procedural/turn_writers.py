"""Write the turns of each category about a drawn scene from templates with exact answers, in place of a language
model.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fusion_hf.drawing.drawn_images import COLORS, DIRECTIONS, MAX_COUNT, SHAPES, WORD_COLORS, WORDS
from fusion_hf.drawing.drawn_questions import (
    COLOR_FORMS,
    COUNT_FORMS,
    RELATION_FORM,
    RELATION_PHRASES,
    WORD_FORMS,
    plural,
)
from fusion_hf.synthesis.category import Category
from fusion_hf.synthesis.choices import Choice
from fusion_hf.synthesis.procedural.scenes import (
    CHANGES,
    EVERYTHING,
    LARGEST_NUMBER,
    PLACES,
    Scene,
    ScenePair,
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

SENTENCE_SHARE = 0.3  # share of sentences among short answers
CAPTION_SHARE = 0.3  # share of alignment records that start with a caption
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

TRUE_SHARE = 1 / 2  # share of yes/no questions whose answer is yes

VALUES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "kind": SHAPES,
    "count": tuple(str(count) for count in range(MAX_COUNT + 1)),  # exactly the numbers that can be right
    "place": tuple(PLACES.values()),
    "relation": tuple(RELATION_PHRASES.values()),
    "word": WORDS,
    "text color": WORD_COLORS,
    "number": tuple(str(number) for number in range(1, LARGEST_NUMBER + 1)),
}


@dataclass(frozen=True)
class SceneQuestion:
    """
    A question with its answer.

    Attributes:
        text: the question.
        short: the answer as a word or a phrase.
        sentence: the answer as a sentence.
        about: a key of `VALUES`, or "" for a yes/no question.
        asks: the fact that the question asks for.
        tells: the facts that the question reveals.
    """

    text: str
    short: str
    sentence: str
    about: str
    asks: str
    tells: frozenset[str] = field(default_factory=frozenset)


def compatible(first: SceneQuestion, second: SceneQuestion) -> bool:
    """
    Return whether neither question asks for what the other one asks for or reveals.

    Args:
        first: a question.
        second: another question.
    """
    return first.asks != second.asks and first.asks not in second.tells and second.asks not in first.tells


def choose(
    candidates: Sequence[SceneQuestion], count: int, rng: random.Random, preferred: Sequence[SceneQuestion] = ()
) -> list[SceneQuestion]:
    """
    Choose questions in random order such that none reveals the answer of another.

    Args:
        candidates: the questions.
        count: the maximum number of questions.
        rng: the source of randomness.
        preferred: questions that are chosen before the candidates. Their answers are distributed evenly, which would
            not hold if scenes with many candidates left them out.
    """
    chosen: list[SceneQuestion] = []
    for asked in (*rng.sample(preferred, len(preferred)), *rng.sample(candidates, len(candidates))):
        if len(chosen) == count:
            break
        if all(compatible(asked, other) for other in chosen):
            chosen.append(asked)
    return rng.sample(chosen, len(chosen))


def sentence_case(text: str) -> str:
    """
    Return a text that starts with a capital letter.

    Args:
        text: the text.
    """
    return text[:1].upper() + text[1:]


def _question(text: str, short: str, sentence: str, about: str, asks: str, *tells: str) -> SceneQuestion:
    return SceneQuestion(sentence_case(text), sentence_case(short), sentence, about, asks, frozenset(tells))


def colors(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask for the colours of shapes, named by kind or place, and of the written text."""
    found = []
    for number, shape in enumerate(scene.shapes):
        key, place = f"color/{number}", place_of(shape)
        if scene.kinds[shape.kind] == 1:
            text = rng.choice(COLOR_FORMS).format(kind=shape.kind)
            answer = f"The {shape.kind} is {shape.color}."
            found.append(_question(text, shape.color, answer, "color", key, f"kind/{number}"))
        if scene.places[place] == 1:
            answer = f"The shape {place} is {shape.color}."
            text = f"what color is the shape {place}?"
            found.append(_question(text, shape.color, answer, "color", key, f"place/{number}"))
    return [*found, *text_colors(scene, rng)]


def text_colors(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask for the colour of the written text."""
    if scene.spec.word is None:
        return []
    color = scene.spec.word.color
    text = rng.choice(COLOR_FORMS).format(kind=scene.text_kind)
    return [_question(text, color, f"The {scene.text_kind} is {color}.", "text color", "word color", "written")]


def kinds(scene: Scene) -> list[SceneQuestion]:
    """Ask for the kinds of shapes, named by colour or place."""
    found = []
    for number, shape in enumerate(scene.shapes):
        key, place, short = f"kind/{number}", place_of(shape), f"a {shape.kind}"
        if scene.colors[shape.color] == 1:
            answer = f"The {shape.kind} is {shape.color}."
            found.append(_question(f"which shape is {shape.color}?", short, answer, "kind", key, f"color/{number}"))
        if scene.places[place] == 1:
            answer = f"A {shape.kind} is {place}."
            found.append(_question(f"what shape is {place}?", short, answer, "kind", key, f"place/{number}"))
    return found


def places(scene: Scene) -> list[SceneQuestion]:
    """Ask for the places of shapes with a unique name and place."""
    found = []
    for number, shape in enumerate(scene.shapes):
        name, place = shape.name, place_of(shape)
        if scene.names[name] == 1 and scene.places[place] == 1:
            text, answer = f"where in the picture is the {name}?", f"The {name} is {place}."
            tells = f"color/{number}", f"kind/{number}"
            found.append(_question(text, place, answer, "place", f"place/{number}", *tells))
    return found


def counts(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask for the numbers of the groups that the scene was drawn for (`Scene.counted`)."""
    found = []
    for group in scene.counted:
        members = scene.members(group)
        attribute = "color" if group.split()[0] in COLORS else "kind"
        count = len(members)
        text = rng.choice(COUNT_FORMS).format(plural=group)
        sentence = _there_are(count, group.removesuffix("s"))
        tells = [f"{attribute}/{number}" for number in members if group != EVERYTHING]
        found.append(_question(text, str(count), sentence, "count", f"count/{group}", *tells))
    return found


def relations(scene: Scene) -> list[SceneQuestion]:
    """Ask where each of two shapes lies relative to the other, and which shape is there."""
    relation = scene.relation()
    if relation is None:
        return []
    first, second = scene.shapes
    opposite = DIRECTIONS[DIRECTIONS.index(relation) ^ 1]  # opposite directions are neighbours in the list
    found = []
    for seen, reference, where in ((first, second, relation), (second, first, opposite)):
        phrase = RELATION_PHRASES[where]
        text = RELATION_FORM.format(seen=seen.name, reference=reference.name)
        sentence = f"The {seen.name} is {phrase} the {reference.name}."
        tells = [f"{what}/{number}" for what in ("color", "kind") for number in range(2)]
        found.append(_question(text, f"{phrase} it", sentence, "relation", "relation", *tells))
        number = scene.shapes.index(seen)
        text, tells = f"which shape is {phrase} the {reference.name}?", [f"color/{1 - number}", f"kind/{1 - number}"]
        found.append(_question(text, f"the {seen.kind}", sentence, "kind", f"kind/{number}", "relation", *tells))
    return found


def texts(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask what is written, whether it is a number or a word, and whether the image says a given text."""
    word = scene.spec.word
    if word is None:
        return []
    kind, read = scene.text_kind, f'"{word.text}"'
    form = rng.choice(WORD_FORMS)
    if rng.random() < TRUE_SHARE:
        said, short, sentence = word.text, "Yes", f"Yes, the picture says {read}."
    else:
        said = rng.choice([text for text in VALUES[kind] if text != word.text])
        short, sentence = f"No, it says {read}.", f"No, the picture says {read}."
    which, answer = "is a number or a word written in the picture?", f"A {kind} is written in the picture."
    tells = ["written"] if "word" in form else []
    return [
        _question(form.replace("word", kind), read, f"It says {read}.", kind, "word", *tells),
        _question(which, f"a {kind}", answer, "", "written"),
        _question(f'does the picture say "{said}"?', short, sentence, "", "word", "written"),
    ]


def presences(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """
    Ask whether a shape exists: an existing one, or one that shares its kind or colour with an existing one.

    Both answers are equally likely, and what the question reveals does not depend on the answer. Otherwise, one of the
    two would be chosen more often.
    """
    if not scene.shapes:
        return []
    number = rng.randrange(len(scene.shapes))
    shape = scene.shapes[number]
    tells = f"color/{number}", f"kind/{number}"
    if rng.random() < TRUE_SHARE:
        name, short, sentence = shape.name, "Yes", f"Yes, there is a {shape.name}."
    else:
        alike = [f"{shape.color} {kind}" for kind in SHAPES] + [f"{color} {shape.kind}" for color in COLORS]
        name = rng.choice([other for other in alike if other not in scene.names])
        short, sentence = "No", f"No, there is no {name}."
    return [_question(f"is there a {name}?", short, sentence, "", "presence", *tells)]


def distractors(asked: SceneQuestion, scene: Scene, count: int, rng: random.Random) -> list[str]:
    """
    Choose wrong answers of the same kind as the right one. Values that occur in the image come first.

    Args:
        asked: the question.
        scene: the scene.
        count: the number of wrong answers.
        rng: the source of randomness.
    """
    values = [value for value in VALUES[asked.about] if value.lower() not in asked.short.lower()]
    in_image = {*scene.colors, *scene.kinds, *scene.places}
    near = [value for value in values if value in in_image]
    far = [value for value in values if value not in in_image]
    chosen = rng.sample(near, min(len(near), 2))
    chosen += rng.sample(far, min(len(far), count - len(chosen)))
    return chosen[:count]


def everything(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask questions of all kinds except numbers, which `choose` takes as `preferred`."""
    lists: Iterable[list[SceneQuestion]] = (
        colors(scene, rng), kinds(scene), places(scene), relations(scene), texts(scene, rng), presences(scene, rng),
    )  # fmt: skip
    return [asked for found in lists for asked in found]


def any_scene(rng: random.Random) -> Scene:
    """Draw a scene to count, a pair of shapes, or a sign."""
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
}  # other categories use any scene

FOCUS: dict[str, Callable[[Scene, random.Random], list[SceneQuestion]]] = {
    "SynthColor": colors,
    "SynthCount": lambda scene, rng: [],  # numbers are added for all categories whose scenes were drawn for them
    "SynthSpatial": lambda scene, rng: [*relations(scene), *places(scene)],
    "SynthText": lambda scene, rng: [*texts(scene, rng), *text_colors(scene, rng)],
    "SynthTextQA": lambda scene, rng: [*texts(scene, rng), *colors(scene, rng), *kinds(scene), *presences(scene, rng)],
}  # other categories use all kinds


def write_turns(category: Category, scene: Scene, rng: random.Random) -> tuple[RecordTurn, ...]:
    """
    Write turns about one image, as many as the category allows and the scene has questions for.

    Args:
        category: the category.
        scene: the scene.
        rng: the source of randomness.
    """
    if category.name == "SynthScene":
        return (_overview(scene, rng),)
    if category.name == "SynthReasoning":
        return (_reasoned(scene, rng),)
    if category.name == "SynthConvLong":
        return _long(scene, rng)
    candidates = FOCUS.get(category.name, everything)(scene, rng)
    if category.name == "SynthMultiChoice":
        candidates = [asked for asked in candidates if asked.about]
    amount = rng.randint(*category.turns)
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
    """Write a full description, and a walk along the rows."""
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
    """Ask for a difference of two numbers, or for the number that remains, as the scene was drawn for."""
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
    """
    Write turns about two images side by side.

    Args:
        category: the category.
        pair: the scenes.
        rng: the source of randomness.
    """
    difference = _difference(pair)
    if category.name == "SynthContrastLong":
        texts = (replace(scene, wording=0).description() for scene in (pair.first, pair.second))
        left, right = (text[:1].lower() + text[1:] for text in texts)
        answer = f"{difference} In the left picture, {left} In the right picture, {right}"
        return (RecordTurn(rng.choice(COMPARISON_FORMS), answer),)
    # Pairs with equal and with different numbers are equally frequent, so that the question reveals no answer.
    counted = pair.difference.what == "count" or rng.random() < 1 / (len(CHANGES) - 1)
    turns = _count_turns(pair) if counted else _sides(pair)
    amount = rng.randint(*category.turns)
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
    """Ask about the thing that differs in each image. Numbers are covered by `_count_turns`."""
    found = pair.difference
    form = _SIDE_FORMS[found.what]
    return [
        RecordTurn(form.format(subject=found.subject, side=side), sentence_case(value))
        for side, value in (("left", found.first), ("right", found.second))
    ]


def _count_turns(pair: ScenePair) -> list[RecordTurn]:
    """Ask how many shapes each image has, and whether the numbers are equal."""
    counts = [len(scene.shapes) for scene in (pair.first, pair.second)]
    asked = "How many shapes are there in the {} picture?"
    return [
        *(RecordTurn(asked.format(side), str(count)) for side, count in zip(("left", "right"), counts, strict=True)),
        RecordTurn("Do both pictures have the same number of shapes?", "Yes" if counts[0] == counts[1] else "No"),
    ]
