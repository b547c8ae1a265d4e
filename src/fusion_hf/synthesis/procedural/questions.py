"""Questions about drawn scenes, with exact answers, from templates."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fusion_hf.nano.pictures import COLORS, DIRECTIONS, MAX_COUNT, SHAPES, WORDS, Shape
from fusion_hf.nano.questions import COLOR_FORMS, COUNT_FORMS, RELATION_FORM, RELATION_PHRASES, WORD_FORMS
from fusion_hf.synthesis.procedural.scenes import PLACES, Scene, place_of, plural, spoken

VALUES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "kind": SHAPES,
    "count": tuple(str(count) for count in range(1, MAX_COUNT + 3)),
    "place": tuple(PLACES.values()),
    "relation": tuple(RELATION_PHRASES.values()),
    "word": WORDS,
}


@dataclass(frozen=True)
class Asked:
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


def compatible(first: Asked, second: Asked) -> bool:
    """Neither asks for what the other one asks for or gives away."""
    return first.asks != second.asks and first.asks not in second.tells and second.asks not in first.tells


def choose(candidates: Sequence[Asked], count: int, rng: random.Random) -> list[Asked]:
    """Up to `count` of them in random order, none of which gives away another one's answer."""
    chosen: list[Asked] = []
    for asked in rng.sample(candidates, len(candidates)):
        if len(chosen) == count:
            break
        if all(compatible(asked, other) for other in chosen):
            chosen.append(asked)
    return chosen


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def colors(scene: Scene, rng: random.Random) -> list[Asked]:
    """Colours of shapes that are named by kind or by place, of all shapes, and of a word."""
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
    if scene.spec.word is not None:
        color = scene.spec.word.color
        text = rng.choice(COLOR_FORMS).format(kind="word")
        found.append(_color(text, color, f"The word is {color}.", "word color", set()))
    return found


def _color(text: str, color: str, sentence: str, asks: str, tells: set[str]) -> Asked:
    return Asked(sentence_case(text), sentence_case(color), sentence, "color", asks, frozenset(tells))


def kinds(scene: Scene) -> list[Asked]:
    """Kinds of shapes that are named by colour or by place."""
    found = []
    for number, shape in enumerate(scene.shapes):
        key, place = f"kind/{number}", place_of(shape)
        named = []
        if scene.colors[shape.color] == 1:
            named.append((f"Which shape is {shape.color}?", f"color/{number}", f"The {shape.kind} is {shape.color}."))
        if scene.places[place] == 1:
            named.append((f"What shape is {place}?", f"place/{number}", f"A {shape.kind} is {place}."))
        found += [
            Asked(text, f"A {shape.kind}", sentence, "kind", key, frozenset({told})) for text, told, sentence in named
        ]
    return found


def places(scene: Scene) -> list[Asked]:
    """Places of shapes whose name and place are their own."""
    return [
        Asked(
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


def counts(scene: Scene, rng: random.Random) -> list[Asked]:
    """Numbers of all shapes, of each kind, and of each colour."""
    groups = [("shapes", "", "")]
    groups += [(f"{kind}s", "kind", kind) for kind in scene.kinds]
    groups += [(f"{color} shapes", "color", color) for color in scene.colors]
    found = []
    for group, attribute, value in groups:
        members = [n for n, shape in enumerate(scene.shapes) if value in ("", shape.kind, shape.color)]
        count = len(members)
        verb = "is" if count == 1 else "are"
        text = sentence_case(rng.choice(COUNT_FORMS).format(plural=group))
        sentence = f"There {verb} {spoken(count)} {plural(group.removesuffix('s'), count)}."
        tells = frozenset(f"{attribute}/{number}" for number in members if attribute)
        found.append(Asked(text, str(count), sentence, "count", f"count/{group}", tells))
    return found


def relations(scene: Scene) -> list[Asked]:
    """Where each of two shapes is from the other one, and which one is there."""
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
        found.append(Asked(text, answer, sentence, "relation", "relation", tells))
        number = scene.shapes.index(seen)
        text = f"Which shape is {phrase} the {reference.name}?"
        tells = frozenset({"relation", f"color/{1 - number}", f"kind/{1 - number}"})
        found.append(Asked(text, f"The {seen.kind}", sentence, "kind", f"kind/{number}", tells))
    return found


def texts(scene: Scene, rng: random.Random) -> list[Asked]:
    """What is written, and whether a word is."""
    word = scene.spec.word
    if word is None:
        return []
    other = rng.choice([text for text in WORDS if text != word.text])
    kind = "number" if word.text.isdigit() else "word"
    read = f'"{word.text}"'
    return [
        Asked(sentence_case(rng.choice(WORD_FORMS)), read, f"It says {read}.", "word", "word"),
        Asked(
            "Is a number or a word written in the picture?",
            sentence_case(f"a {kind}"),
            f"A {kind} is written in the picture.",
            "",
            "written",
        ),
        Asked(
            f'Does the picture say "{other}"?',
            f"No, it says {read}",
            f"No, the picture says {read}.",
            "",
            "word",
        ),
    ]


def presences(scene: Scene, rng: random.Random) -> list[Asked]:
    """Whether a shape is there: one that is, and one that is not."""
    if not scene.shapes:
        return []
    names = {shape.name for shape in scene.shapes}
    missing = [Shape(kind, color, 0, 0, 0, 0) for kind in SHAPES for color in COLORS]
    absent = rng.choice([shape for shape in missing if shape.name not in names])
    number = rng.randrange(len(scene.shapes))
    present = scene.shapes[number]
    tells = frozenset({f"color/{number}", f"kind/{number}", "presence"})
    return [
        Asked(f"Is there a {absent.name}?", "No", f"No, there is no {absent.name}.", "", f"is/{absent.name}"),
        Asked(f"Is there a {present.name}?", "Yes", f"Yes, there is a {present.name}.", "", "present", tells),
    ]


def distractors(asked: Asked, scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Wrong answers of the right one's kind; those that are somewhere in the picture come first."""
    values = [value for value in VALUES[asked.about] if value.lower() not in asked.short.lower()]
    in_picture = {*scene.colors, *scene.kinds, *scene.places}
    near = [value for value in values if value in in_picture]
    far = [value for value in values if value not in in_picture]
    chosen = rng.sample(near, min(len(near), 2))
    chosen += rng.sample(far, min(len(far), count - len(chosen)))
    return chosen[:count]


def everything(scene: Scene, rng: random.Random) -> list[Asked]:
    """Questions of all kinds."""
    lists: Iterable[list[Asked]] = (
        colors(scene, rng), kinds(scene), places(scene), counts(scene, rng) if scene.shapes else [], relations(scene),
        texts(scene, rng), presences(scene, rng),
    )  # fmt: skip
    return [asked for found in lists for asked in found]
