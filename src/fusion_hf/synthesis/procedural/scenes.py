"""Drawn scenes: exact facts about an image, its description in words, and pairs that differ in one thing."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from fusion_hf.drawing.drawn_images import (
    CANVAS_SIDE,
    COLORS,
    COUNT_GRID,
    MAX_COUNT,
    SHAPES,
    TRIANGLE_ASPECT,
    WORD_COLORS,
    WORDS,
    DrawnImage,
    DrawnShape,
    DrawnWord,
    count_spec,
    direction,
    place_word,
    single_spec,
    spatial_spec,
)
from fusion_hf.drawing.drawn_questions import RELATION_PHRASES, drawn_caption, plural
from fusion_hf.synthesis.filters.words import UNITS

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = {
    (row, column): f"at the {row} {column}" if column != "center" else f"at the {row}"
    for row in ("top", "bottom")
    for column in COLUMNS
} | {("middle", "left"): "on the left", ("middle", "center"): "in the middle", ("middle", "right"): "on the right"}
LARGEST_NUMBER = 999  # largest number to write
NUMBER_SHARE = 0.5  # share of numbers among written texts
BAND = CANVAS_SIDE // 2  # height of the halves of a sign in canvas pixels: one has shapes, the other the text
TOTAL_SHARE = 1 / 3  # share of scenes whose total is counted; the others are counted by kind and by colour
EVERYTHING = "shapes"  # the group of all shapes
SIGN_SIZES = (24, 40)  # sizes of shapes in canvas pixels
SIGN_WORD = 36  # maximum font size
CELL = CANVAS_SIDE / COUNT_GRID  # side of a grid cell for a shape of `count_spec`
LEAST_SIDE = 0.6  # minimum side of a rectangle that replaces another shape, relative to the side of that shape's box
MOST_TRIES = 1000  # attempts to draw a scene with a property that is not rare


# Openings of descriptions with `{count} {noun}`. They are followed by `: {groups}.`
OPENINGS = (
    "There {verb} {count} {noun} on a plain light background",
    "On a plain light background, there {verb} {count} {noun}",
    "The plain light background has {count} {noun} on it",
)
# Closings of descriptions. Most are empty, since the text is complete without them.
CLOSINGS = (
    "",
    "",
    "",
    "Nothing else can be seen in the picture.",
    "The rest of the picture is empty.",
    "There is nothing more to see.",
)
WORDINGS = len(OPENINGS) * len(CLOSINGS)


def spoken(count: int) -> str:
    """
    Return a number as a word.

    Args:
        count: the number.
    """
    return UNITS[count]


def listing(parts: Sequence[str]) -> str:
    """
    Join parts as "a, b and c".

    Args:
        parts: the parts.
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def place_of(shape: DrawnShape) -> str:
    """
    Return the ninth of the image in which the centre of a shape lies.

    Args:
        shape: the shape.
    """
    cells = (min(2, int(3 * middle / CANVAS_SIDE)) for middle in shape.center)
    column, row = cells
    return PLACES[ROWS[row], COLUMNS[column]]


@dataclass(frozen=True)
class Scene:
    """
    An image to draw, and the facts about it.

    Attributes:
        spec: the specification of the image.
        counted: the groups ("shapes", "circles", "red shapes") whose numbers are drawn first, uniformly from zero.
            Only these are asked for, since other groups would mostly have one member.
        wording: selects the opening and the closing of the description.
    """

    spec: DrawnImage
    counted: tuple[str, ...] = ()
    wording: int = 0

    @property
    def shapes(self) -> tuple[DrawnShape, ...]:
        """Shapes of the image."""
        return self.spec.shapes

    @cached_property
    def names(self) -> Counter[str]:
        """The number of shapes by name, such as "red circle", in the order of the shapes."""
        return Counter(shape.name for shape in self.shapes)

    @cached_property
    def kinds(self) -> Counter[str]:
        """The number of shapes by kind."""
        return Counter(shape.kind for shape in self.shapes)

    @cached_property
    def colors(self) -> Counter[str]:
        """The number of shapes by colour."""
        return Counter(shape.color for shape in self.shapes)

    @cached_property
    def places(self) -> Counter[str]:
        """The number of shapes by place."""
        return Counter(place_of(shape) for shape in self.shapes)

    def facts(self) -> dict[str, Any]:
        """Return exact annotations in canvas pixels (twice those of the image) as JSON values."""
        facts = asdict(self.spec)
        return facts | {"background": list(facts["background"]), "shapes": list(facts["shapes"]), "side": CANVAS_SIDE}

    def caption(self) -> str:
        """Describe the scene in one sentence."""
        word = self.spec.word
        if word is None:
            return drawn_caption(self.spec)
        if not self.shapes:
            return f'the {word.color} {self.text_kind} "{word.text}".'
        shapes = drawn_caption(replace(self.spec, category="count" if len(self.shapes) > 1 else "single", word=None))
        where = "above" if self.text_is_below else "below"
        return f'{shapes.removesuffix(".")} {where} the {self.text_kind} "{word.text}".'

    @property
    def text_kind(self) -> str:
        """
        The kind of written text, "number" or "word".

        Raises:
            ValueError: if nothing is written.
        """
        if self.spec.word is None:
            raise ValueError("This scene has no written text.")
        return "number" if self.spec.word.text.isdigit() else "word"

    @property
    def text_is_below(self) -> bool:
        """Whether the text of a sign is below its shapes."""
        return self.spec.word is not None and self.spec.word.top >= BAND

    def places_told(self) -> list[str]:
        """Return a sentence for each name whose shapes have places of their own."""
        told = []
        for name, count in self.names.items():
            places = [place_of(shape) for shape in self.shapes if shape.name == name]
            if any(self.places[place] > 1 for place in places):
                continue
            told.append(f"The {plural(name, count)} {'is' if count == 1 else 'are'} {listing(places)}.")
        return told

    def members(self, group: str) -> list[int]:
        """
        Return the indices of the shapes that belong to a group of `counted`.

        Args:
            group: the group.
        """
        value = group.split()[0]
        return [n for n, shape in enumerate(self.shapes) if value in (EVERYTHING, f"{shape.kind}s", shape.color)]

    def stated(self) -> str:
        """Describe the scene for a filter, which also excludes the counted groups without members."""
        missing = [f"no {group}" for group in self.counted if not self.members(group)]
        return f"{self.description()} There are {listing(missing)}." if missing else self.description()

    def relation(self) -> str | None:
        """Return where the first of two shapes lies relative to the second, one of `DIRECTIONS`."""
        return direction(*self.shapes) if self.spec.category == "spatial" else None

    def description(self) -> str:
        """Describe everything in the image in sentences."""
        closing, opening = divmod(self.wording, len(OPENINGS))
        total = len(self.shapes)
        sentences = []
        if self.shapes:
            verb, noun = "is" if total == 1 else "are", plural("shape", total)
            begin = OPENINGS[opening].format(verb=verb, count=spoken(total), noun=noun)
            groups = [f"{spoken(count)} {plural(name, count)}" for name, count in self.names.items()]
            sentences.append(f"{begin}: {listing(groups)}.")
            sentences += self.places_told()
        if (relation := self.relation()) is not None:
            first, second = self.shapes
            sentences.append(f"The {first.name} is {RELATION_PHRASES[relation]} the {second.name}.")
        if (word := self.spec.word) is not None:
            where = f"{'below' if self.text_is_below else 'above'} the {plural('shape', total)}"
            where = where if self.shapes else "on a plain light background"
            signs = "digits" if self.text_kind == "number" else "letters"
            sentences.append(f'The {self.text_kind} "{word.text}" is written in {word.color} {signs} {where}.')
        return " ".join([*sentences, CLOSINGS[closing]]).rstrip()


def draw_until(
    rng: random.Random, maker: Callable[[random.Random], DrawnImage], wanted: Callable[[Scene], bool]
) -> Scene:
    """
    Draw scenes until one has a property.

    Args:
        rng: the source of randomness.
        maker: draws a specification.
        wanted: tests the property.

    Raises:
        RuntimeError: if no scene of many has the property.
    """
    for _ in range(MOST_TRIES):
        scene = Scene(maker(rng))
        if wanted(scene):
            return scene
    raise RuntimeError(f"{maker.__name__}: none of {MOST_TRIES} scenes has the requested property.")


def written_text(rng: random.Random) -> str:
    """Draw a word or a number."""
    return str(rng.randint(1, LARGEST_NUMBER)) if rng.random() < NUMBER_SHARE else rng.choice(WORDS)


def text_scene(rng: random.Random) -> Scene:
    """Draw a single word or number."""
    word = place_word(written_text(rng), rng.choice(WORD_COLORS), rng)
    return Scene(DrawnImage("text", single_spec(rng).background, word=word))


def sign_scene(rng: random.Random) -> Scene:
    """Draw one or two shapes above or below a word or a number."""
    count = rng.randint(1, 2)
    text_below = rng.random() < 1 / 2
    top = 0 if text_below else BAND
    kinds, colors = rng.sample(SHAPES, count), rng.sample(tuple(COLORS), count)
    shapes = []
    for index, (kind, color) in enumerate(zip(kinds, colors, strict=True)):
        size = rng.randint(*SIGN_SIZES)
        room = CANVAS_SIDE // count - size
        left, top = index * CANVAS_SIDE // count + rng.randint(0, room), top + rng.randint(0, BAND - size)
        shapes.append(DrawnShape(kind, color, left, top, size, size))
    word = sign_text(written_text(rng), rng.choice(WORD_COLORS), rng, text_below)
    return Scene(DrawnImage("text", single_spec(rng).background, tuple(shapes), word))


def writing_scene(rng: random.Random) -> Scene:
    """Draw a word or a number, alone or with shapes."""
    return sign_scene(rng) if rng.random() < 1 / 2 else text_scene(rng)


def sign_text(text: str, color: str, rng: random.Random, below: bool) -> DrawnWord:
    """
    Place the text of a sign in the half of the image without shapes.

    Args:
        text: the text.
        color: its colour.
        rng: the source of randomness.
        below: whether the text is below the shapes.
    """
    top, bottom = (BAND, CANVAS_SIDE) if below else (0, BAND)
    return place_word(text, color, rng, SIGN_WORD, top, bottom)


def shapes_scene(rng: random.Random, least: int = 1, kinds: int = 1, colors: int = 1) -> Scene:
    """
    Draw shapes that do not touch each other.

    Args:
        rng: the source of randomness.
        least: the minimum number of shapes.
        kinds: the minimum number of different kinds.
        colors: the minimum number of different colours.
    """

    def wanted(scene: Scene) -> bool:
        return len(scene.shapes) >= least and len(scene.kinds) >= kinds and len(scene.colors) >= colors

    return draw_until(rng, count_spec, wanted)


def pair_scene(rng: random.Random) -> Scene:
    """Draw two shapes with a clear relation."""
    return Scene(spatial_spec(rng))


def counted_scene(rng: random.Random) -> Scene:
    """
    Draw shapes whose numbers are drawn first: all numbers from zero to `MAX_COUNT` are equally likely.

    A total is never asked for together with a group, since it depends on the number of the group. A scene without
    shapes has a written text.

    Args:
        rng: the source of randomness.
    """
    if rng.random() < TOTAL_SHARE:
        total = rng.randint(0, MAX_COUNT)
        scene = exact_scene(rng, total) if total else text_scene(rng)
        return replace(scene, counted=(EVERYTHING,))
    kind, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    of_kind, of_color = (rng.randint(0, MAX_COUNT) for _ in range(2))
    total = rng.randint(max(of_kind, of_color, 1), MAX_COUNT)
    scene = exact_scene(rng, total)
    kinds = _with_members(rng, SHAPES, kind, of_kind, total)
    colors = _with_members(rng, tuple(COLORS), color, of_color, total)
    return replace(recast(scene, kinds, colors, rng), counted=(f"{kind}s", f"{color} shapes"))


def _with_members(rng: random.Random, values: Sequence[str], value: str, members: int, total: int) -> list[str]:
    """Return `total` values in random order, of which `members` are `value`."""
    others = [other for other in values if other != value]
    drawn = [value] * members + [rng.choice(others) for _ in range(total - members)]
    rng.shuffle(drawn)
    return drawn


def exact_scene(rng: random.Random, total: int) -> Scene:
    """
    Draw a given number of shapes that do not touch each other.

    Args:
        rng: the source of randomness.
        total: the number of shapes, from one to `MAX_COUNT`.
    """
    return draw_until(rng, count_spec, lambda scene: len(scene.shapes) == total)


def recast(scene: Scene, kinds: Iterable[str], colors: Iterable[str], rng: random.Random) -> Scene:
    """
    Replace the kinds and colours of the shapes, and keep their places.

    Args:
        scene: the scene.
        kinds: the new kind of each shape.
        colors: the new colour of each shape.
        rng: the source of randomness.
    """
    given = zip(scene.shapes, kinds, colors, strict=True)
    shapes = tuple(replace(reshaped(shape, kind, rng), color=color) for shape, kind, color in given)
    return replace(scene, spec=replace(scene.spec, shapes=shapes))


def reshaped(shape: DrawnShape, kind: str, rng: random.Random) -> DrawnShape:
    """
    Change the kind of a shape, with the same centre and inside the same box. A circle never becomes an ellipse.

    Args:
        shape: the shape.
        kind: the new kind.
        rng: the source of randomness.
    """
    if kind == shape.kind:
        return shape
    side = min(shape.width, shape.height)
    width, height = side, side * TRIANGLE_ASPECT if kind == "triangle" else side
    if kind == "rectangle":
        width, height = (rng.uniform(LEAST_SIDE * length, length) for length in (shape.width, shape.height))
    column, row = shape.center
    left, top = round(column - width / 2), round(row - height / 2)
    return DrawnShape(kind, shape.color, left, top, width, height)


def reasoning_scene(rng: random.Random) -> Scene:
    """
    Draw shapes for a question whose answer is drawn first.

    `counted` has two kinds for the difference of their numbers, from 0 to `MAX_COUNT`, or one kind for the number of
    the remaining shapes, from 0 to `MAX_COUNT - 1`.

    Args:
        rng: the source of randomness.
    """
    first, second, third = rng.sample(SHAPES, len(SHAPES))
    counted: tuple[str, ...]
    if rng.random() < 1 / 2:
        difference = rng.randint(0, MAX_COUNT)
        fewer = rng.randint(int(difference == 0), (MAX_COUNT - difference) // 2)
        more = fewer + difference
        rest = rng.randint(0, MAX_COUNT - more - fewer)
        kinds = [first] * more + [second] * fewer + [third] * rest
        counted = (first, second)
    else:
        left = rng.randint(0, MAX_COUNT - 1)
        taken = rng.randint(1, MAX_COUNT - left)
        kinds = [first] * taken + [rng.choice((second, third)) for _ in range(left)]
        counted = (first,)
    rng.shuffle(kinds)
    scene = exact_scene(rng, len(kinds))
    scene = recast(scene, kinds, [shape.color for shape in scene.shapes], rng)
    return replace(scene, counted=tuple(f"{kind}s" for kind in counted))


@dataclass(frozen=True)
class SceneDifference:
    """
    The difference between two scenes.

    Attributes:
        what: "color", "kind", "place", "count" or "text".
        subject: the thing that changes, named by what is equal in both scenes.
        first: its value in the first scene.
        second: its value in the second scene.
    """

    what: str
    subject: str
    first: str
    second: str


@dataclass(frozen=True)
class ScenePair:
    """Two scenes and their only difference."""

    first: Scene
    second: Scene
    difference: SceneDifference

    def worded(self, wording: int) -> "ScenePair":
        """
        Use the same wording for both descriptions, so that they differ in one thing only.

        Args:
            wording: the wording.
        """
        first, second = (replace(scene, wording=wording, counted=(EVERYTHING,)) for scene in (self.first, self.second))
        return ScenePair(first, second, self.difference)


def draw_pair(rng: random.Random) -> ScenePair:
    """
    Draw a scene, and the same scene with one change.

    Args:
        rng: the source of randomness.
    """
    change = rng.choice(CHANGES)
    if change is change_count:
        scene = _countable(rng)
    elif change is change_text:
        scene = writing_scene(rng)
    else:
        scene = shapes_scene(rng)
    pair = change(scene, rng)
    if rng.random() < 1 / 2:
        return pair
    swapped = replace(pair.difference, first=pair.difference.second, second=pair.difference.first)
    return ScenePair(pair.second, pair.first, swapped)


def _countable(rng: random.Random) -> Scene:
    """
    Draw one to `MAX_COUNT` shapes, each number equally likely. A single shape gets a text, which stays without
    it.
    """
    total = rng.randint(1, MAX_COUNT)
    scene = exact_scene(rng, total) if total > 1 else sign_scene(rng)
    return replace(scene, spec=replace(scene.spec, shapes=scene.shapes[:total]))


def _changed(scene: Scene, index: int, shape: DrawnShape, difference: SceneDifference) -> ScenePair:
    """Return the scene, and the same scene with one shape replaced."""
    shapes = (*scene.shapes[:index], shape, *scene.shapes[index + 1 :])
    return ScenePair(scene, Scene(replace(scene.spec, shapes=shapes)), difference)


def change_color(scene: Scene, rng: random.Random) -> ScenePair:
    """Change the colour of one shape."""
    index = rng.randrange(len(scene.shapes))
    shape = scene.shapes[index]
    color = rng.choice([color for color in COLORS if color != shape.color])
    difference = SceneDifference("color", f"the {shape.kind} {place_of(shape)}", shape.color, color)
    return _changed(scene, index, replace(shape, color=color), difference)


def change_kind(scene: Scene, rng: random.Random) -> ScenePair:
    """Change the kind of one shape, in its place."""
    index = rng.randrange(len(scene.shapes))
    shape = scene.shapes[index]
    kind = rng.choice([kind for kind in SHAPES if kind != shape.kind])
    difference = SceneDifference("kind", f"the {shape.color} shape {place_of(shape)}", f"a {shape.kind}", f"a {kind}")
    return _changed(scene, index, reshaped(shape, kind, rng), difference)


def change_place(scene: Scene, rng: random.Random) -> ScenePair:
    """Move a shape with a unique name to a free place."""
    single = [index for index, shape in enumerate(scene.shapes) if scene.names[shape.name] == 1]
    if not single:
        return change_color(scene, rng)
    index = rng.choice(single)
    shape = scene.shapes[index]
    moved = _in_free_cell(scene, shape, rng)
    difference = SceneDifference("place", f"the {shape.name}", place_of(shape), place_of(moved))
    return _changed(scene, index, moved, difference)


def change_count(scene: Scene, rng: random.Random) -> ScenePair:
    """Remove one shape."""
    index = rng.randrange(len(scene.shapes))
    name = scene.shapes[index].name
    shapes = (*scene.shapes[:index], *scene.shapes[index + 1 :])
    second = Scene(replace(scene.spec, shapes=shapes))
    counts = (str(scene.names[name]), str(second.names[name]))
    return ScenePair(scene, second, SceneDifference("count", name, *counts))


def change_text(scene: Scene, rng: random.Random) -> ScenePair:
    """Change the word or number on the sign."""
    word = scene.spec.word
    assert word is not None, "a sign has a text"
    text = written_text(rng)
    while text == word.text:
        text = written_text(rng)
    if scene.shapes:
        changed = sign_text(text, word.color, rng, scene.text_is_below)
    else:
        changed = place_word(text, word.color, rng)
    second = Scene(replace(scene.spec, word=changed))
    return ScenePair(scene, second, SceneDifference("text", "the writing", f'"{word.text}"', f'"{text}"'))


CHANGES = (change_color, change_kind, change_place, change_count, change_text)


def _in_free_cell(scene: Scene, shape: DrawnShape, rng: random.Random) -> DrawnShape:
    taken = {tuple(int(middle / CELL) for middle in other.center) for other in scene.shapes}
    cells = [(column, row) for column in range(COUNT_GRID) for row in range(COUNT_GRID)]
    column, row = rng.choice([cell for cell in cells if cell not in taken])
    left, top = column * CELL + (CELL - shape.width) / 2, row * CELL + (CELL - shape.height) / 2
    return replace(shape, left=round(left), top=round(top))
