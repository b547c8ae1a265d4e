"""Questions about drawn scenes, with exact answers, from templates."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from fusion_hf.drawing.drawn_images import COLORS, DIRECTIONS, MAX_COUNT, SHAPES, WORD_COLORS, WORDS
from fusion_hf.drawing.drawn_questions import (
    COLOR_FORMS,
    COUNT_FORMS,
    RELATION_FORM,
    RELATION_PHRASES,
    WORD_FORMS,
    plural,
)
from fusion_hf.synthesis.procedural.scenes import EVERYTHING, LARGEST_NUMBER, PLACES, Scene, place_of, spoken

TRUE_SHARE = 1 / 2  # of questions of yes or no have the answer yes

VALUES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "kind": SHAPES,
    "count": tuple(str(count) for count in range(MAX_COUNT + 1)),  # those that can be right, and no others
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
        short, sentence: the answer in a word or a phrase, and as a sentence.
        about: key of `VALUES`, or "" for a question of yes or no.
        asks: the fact that it asks for; `tells`: the facts that it gives away.
    """

    text: str
    short: str
    sentence: str
    about: str
    asks: str
    tells: frozenset[str] = field(default_factory=frozenset)


def compatible(first: SceneQuestion, second: SceneQuestion) -> bool:
    """Check that neither asks for what the other one asks for or gives away."""
    return first.asks != second.asks and first.asks not in second.tells and second.asks not in first.tells


def choose(
    candidates: Sequence[SceneQuestion], count: int, rng: random.Random, preferred: Sequence[SceneQuestion] = ()
) -> list[SceneQuestion]:
    """
    Choose up to `count` of them in random order, none of which gives away another one's answer.

    Args:
        preferred: questions that are taken before the candidates. Their answers are spread evenly, which would end if
            scenes with many candidates left them out.
    """
    chosen: list[SceneQuestion] = []
    for asked in (*rng.sample(preferred, len(preferred)), *rng.sample(candidates, len(candidates))):
        if len(chosen) == count:
            break
        if all(compatible(asked, other) for other in chosen):
            chosen.append(asked)
    return rng.sample(chosen, len(chosen))


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def colors(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask for colours of shapes that are named by kind or by place, and of what is written."""
    found = []
    for number, shape in enumerate(scene.shapes):
        key, place = f"color/{number}", place_of(shape)
        if scene.kinds[shape.kind] == 1:
            text = rng.choice(COLOR_FORMS).format(kind=shape.kind)
            answer = f"The {shape.kind} is {shape.color}."
            found.append(_color(text, shape.color, answer, key, {f"kind/{number}"}))
        if scene.places[place] == 1:
            answer = f"The shape {place} is {shape.color}."
            found.append(_color(f"what color is the shape {place}?", shape.color, answer, key, {f"place/{number}"}))
    return [*found, *text_colors(scene, rng)]


def text_colors(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask for the colour of what is written."""
    if scene.spec.word is None:
        return []
    color = scene.spec.word.color
    text = rng.choice(COLOR_FORMS).format(kind=scene.text_kind)
    asked = _color(text, color, f"The {scene.text_kind} is {color}.", "word color", {"written"})
    return [replace(asked, about="text color")]


def _color(text: str, color: str, sentence: str, asks: str, tells: set[str]) -> SceneQuestion:
    return SceneQuestion(sentence_case(text), sentence_case(color), sentence, "color", asks, frozenset(tells))


def kinds(scene: Scene) -> list[SceneQuestion]:
    """Ask for kinds of shapes that are named by colour or by place."""
    found = []
    for number, shape in enumerate(scene.shapes):
        key, place = f"kind/{number}", place_of(shape)
        named = []
        if scene.colors[shape.color] == 1:
            named.append((f"Which shape is {shape.color}?", f"color/{number}", f"The {shape.kind} is {shape.color}."))
        if scene.places[place] == 1:
            named.append((f"What shape is {place}?", f"place/{number}", f"A {shape.kind} is {place}."))
        found += [
            SceneQuestion(text, f"A {shape.kind}", sentence, "kind", key, frozenset({told}))
            for text, told, sentence in named
        ]
    return found


def places(scene: Scene) -> list[SceneQuestion]:
    """Ask for places of shapes whose name and place are their own."""
    return [
        SceneQuestion(
            f"Where in the picture is the {shape.name}?",
            sentence_case(place_of(shape)),
            f"The {shape.name} is {place_of(shape)}.",
            "place",
            f"place/{number}",
            frozenset({f"color/{number}", f"kind/{number}"}),
        )
        for number, shape in enumerate(scene.shapes)
        if scene.names[shape.name] == 1 and scene.places[place_of(shape)] == 1
    ]


def counts(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask for numbers of the groups of shapes that the scene was drawn for (`Scene.counted`)."""
    found = []
    for group in scene.counted:
        members = scene.members(group)
        attribute = "color" if group.split()[0] in COLORS else "kind"
        count = len(members)
        verb, amount = "is" if count == 1 else "are", spoken(count) if count else "no"
        text = sentence_case(rng.choice(COUNT_FORMS).format(plural=group))
        sentence = f"There {verb} {amount} {plural(group.removesuffix('s'), count)}."
        tells = frozenset(f"{attribute}/{number}" for number in members if group != EVERYTHING)
        found.append(SceneQuestion(text, str(count), sentence, "count", f"count/{group}", tells))
    return found


def relations(scene: Scene) -> list[SceneQuestion]:
    """Ask where each of two shapes is from the other one, and which one is there."""
    relation = scene.relation()
    if relation is None:
        return []
    first, second = scene.shapes
    opposite = DIRECTIONS[DIRECTIONS.index(relation) ^ 1]  # pairs stand together
    found = []
    for seen, reference, where in ((first, second, relation), (second, first, opposite)):
        phrase = RELATION_PHRASES[where]
        text = sentence_case(RELATION_FORM.format(seen=seen.name, reference=reference.name))
        sentence = f"The {seen.name} is {phrase} the {reference.name}."
        answer = sentence_case(f"{phrase} it")
        tells = frozenset(f"{what}/{number}" for what in ("color", "kind") for number in range(2))
        found.append(SceneQuestion(text, answer, sentence, "relation", "relation", tells))
        number = scene.shapes.index(seen)
        text = f"Which shape is {phrase} the {reference.name}?"
        tells = frozenset({"relation", f"color/{1 - number}", f"kind/{1 - number}"})
        found.append(SceneQuestion(text, f"The {seen.kind}", sentence, "kind", f"kind/{number}", tells))
    return found


def texts(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask what is written, of which kind it is, and whether the image says a text: that one or another of its kind."""
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
    tells = frozenset({"written"})
    return [
        SceneQuestion(
            sentence_case(form.replace("word", kind)),
            read,
            f"It says {read}.",
            kind,
            "word",
            tells if "word" in form else frozenset(),
        ),
        SceneQuestion(
            "Is a number or a word written in the picture?",
            sentence_case(f"a {kind}"),
            f"A {kind} is written in the picture.",
            "",
            "written",
        ),
        SceneQuestion(f'Does the picture say "{said}"?', short, sentence, "", "word", tells),
    ]


def presences(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """
    Ask whether a shape is there: one that is, or one that has its kind or its colour from one that is.

    Both answers are as likely, and what the question gives away does not depend on the answer: else one of the two
    would be chosen more often.
    """
    if not scene.shapes:
        return []
    number = rng.randrange(len(scene.shapes))
    shape = scene.shapes[number]
    tells = frozenset({f"color/{number}", f"kind/{number}"})
    if rng.random() < TRUE_SHARE:
        name, short, sentence = shape.name, "Yes", f"Yes, there is a {shape.name}."
    else:
        alike = [f"{shape.color} {kind}" for kind in SHAPES] + [f"{color} {shape.kind}" for color in COLORS]
        name = rng.choice([other for other in alike if other not in scene.names])
        short, sentence = "No", f"No, there is no {name}."
    return [SceneQuestion(f"Is there a {name}?", short, sentence, "", "presence", tells)]


def distractors(asked: SceneQuestion, scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Choose wrong answers of the right one's kind; those that are somewhere in the image come first."""
    values = [value for value in VALUES[asked.about] if value.lower() not in asked.short.lower()]
    in_image = {*scene.colors, *scene.kinds, *scene.places}
    near = [value for value in values if value in in_image]
    far = [value for value in values if value not in in_image]
    chosen = rng.sample(near, min(len(near), 2))
    chosen += rng.sample(far, min(len(far), count - len(chosen)))
    return chosen[:count]


def everything(scene: Scene, rng: random.Random) -> list[SceneQuestion]:
    """Ask questions of all kinds but for numbers, which `choose` takes as `preferred`."""
    lists: Iterable[list[SceneQuestion]] = (
        colors(scene, rng), kinds(scene), places(scene), relations(scene), texts(scene, rng), presences(scene, rng),
    )  # fmt: skip
    return [asked for found in lists for asked in found]
