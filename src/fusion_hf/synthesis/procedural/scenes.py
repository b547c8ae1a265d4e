"""Drawn scenes: what is in a picture, in exact facts and in words."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from fusion_hf.nano.pictures import (
    CANVAS_SIDE,
    COLORS,
    SHAPES,
    WORD_COLORS,
    WORDS,
    PictureSpec,
    Shape,
    count_spec,
    direction,
    place_word,
    single_spec,
    spatial_spec,
)
from fusion_hf.nano.questions import RELATION_PHRASES, drawn_caption
from fusion_hf.synthesis.filters.words import UNITS

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = {
    (row, column): f"at the {row} {column}" if column != "center" else f"at the {row}"
    for row in ("top", "bottom")
    for column in COLUMNS
} | {("middle", "left"): "on the left", ("middle", "center"): "in the middle", ("middle", "right"): "on the right"}
LARGEST_NUMBER = 999  # that is written
NUMBER_SHARE = 0.3  # of written texts are numbers
BAND = CANVAS_SIDE // 2  # shapes of a sign are above it, its word is below, in canvas pixels
SIGN_SIZES = (24, 40)  # of shapes, in canvas pixels
SIGN_WORD = 36  # largest font size
MOST_TRIES = 1000  # of drawing a scene with a property that is not rare


def spoken(count: int) -> str:
    """A number as a word."""
    return UNITS[count]


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def listing(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def place_of(shape: Shape) -> str:
    """In which ninth of the picture its middle lies."""
    cells = (min(2, int(3 * middle / CANVAS_SIDE)) for middle in shape.center)
    column, row = cells
    return PLACES[ROWS[row], COLUMNS[column]]


@dataclass(frozen=True)
class Scene:
    """A picture to draw, and what is true of it."""

    spec: PictureSpec

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.spec.shapes

    @cached_property
    def names(self) -> Counter[str]:
        """How many there are of "red circle", in the order of the shapes."""
        return Counter(shape.name for shape in self.shapes)

    @cached_property
    def kinds(self) -> Counter[str]:
        return Counter(shape.kind for shape in self.shapes)

    @cached_property
    def colors(self) -> Counter[str]:
        return Counter(shape.color for shape in self.shapes)

    @cached_property
    def places(self) -> Counter[str]:
        return Counter(place_of(shape) for shape in self.shapes)

    def facts(self) -> dict[str, Any]:
        """Exact annotations in canvas pixels (twice the picture's), JSON values."""
        facts = asdict(self.spec)
        return facts | {"background": list(facts["background"]), "shapes": list(facts["shapes"]), "side": CANVAS_SIDE}

    def caption(self) -> str:
        """One sentence."""
        if self.spec.word is None or not self.shapes:
            return drawn_caption(self.spec)
        shapes = drawn_caption(replace(self.spec, category="count" if len(self.shapes) > 1 else "single", word=None))
        return f'{shapes.removesuffix(".")} above the word "{self.spec.word.text}".'

    def described_groups(self) -> list[str]:
        """ "two red circles", "one blue triangle"."""
        return [f"{spoken(count)} {plural(name, count)}" for name, count in self.names.items()]

    def places_told(self) -> list[str]:
        """A sentence for each shape that is the only one of its name and place."""
        return [
            f"The {shape.name} is {place_of(shape)}."
            for shape in self.shapes
            if self.names[shape.name] == 1 and self.places[place_of(shape)] == 1
        ]

    def relation(self) -> str | None:
        """Where the first of two shapes is from the second, one of `DIRECTIONS`."""
        return direction(*self.shapes) if self.spec.category == "spatial" else None

    def description(self) -> str:
        """All that is in the picture, in sentences."""
        sentences = []
        if self.shapes:
            total = len(self.shapes)
            verb, noun = ("is", "shape") if total == 1 else ("are", "shapes")
            groups = listing(self.described_groups())
            sentences.append(f"There {verb} {spoken(total)} {noun} on a plain light background: {groups}.")
            sentences += self.places_told()
        if (relation := self.relation()) is not None:
            first, second = self.shapes
            sentences.append(f"The {first.name} is {RELATION_PHRASES[relation]} the {second.name}.")
        if (word := self.spec.word) is not None:
            where = "below the shapes" if self.shapes else "on a plain light background"
            sentences.append(f'"{word.text}" is written in {word.color} letters {where}.')
        sentences.append("Nothing else can be seen in the picture.")
        return " ".join(sentences)


def draw_until(
    rng: random.Random, maker: Callable[[random.Random], PictureSpec], wanted: Callable[[Scene], bool]
) -> Scene:
    """The first scene of a kind with a property.

    Raises:
        RuntimeError: if the property is as good as never there.
    """
    for _ in range(MOST_TRIES):
        scene = Scene(maker(rng))
        if wanted(scene):
            return scene
    raise RuntimeError(f"{maker.__name__}: none of {MOST_TRIES} scenes has the property that is wanted")


def written_text(rng: random.Random) -> str:
    """A word or a number."""
    return str(rng.randint(1, LARGEST_NUMBER)) if rng.random() < NUMBER_SHARE else rng.choice(WORDS)


def text_scene(rng: random.Random) -> Scene:
    """A word or a number, alone."""
    word = place_word(written_text(rng), rng.choice(WORD_COLORS), rng)
    return Scene(PictureSpec("text", single_spec(rng).background, word=word))


def sign_scene(rng: random.Random) -> Scene:
    """One or two shapes above a word or a number."""
    count = rng.randint(1, 2)
    kinds, colors = rng.sample(SHAPES, count), rng.sample(tuple(COLORS), count)
    shapes = []
    for index, (kind, color) in enumerate(zip(kinds, colors, strict=True)):
        size = rng.randint(*SIGN_SIZES)
        room = CANVAS_SIDE // count - size
        left, top = index * CANVAS_SIDE // count + rng.randint(0, room), rng.randint(0, BAND - size)
        shapes.append(Shape(kind, color, left, top, size, size))
    word = place_word(written_text(rng), rng.choice(WORD_COLORS), rng, SIGN_WORD, top=BAND)
    return Scene(PictureSpec("text", single_spec(rng).background, tuple(shapes), word))


def shapes_scene(rng: random.Random, least: int = 1, kinds: int = 1, colors: int = 1) -> Scene:
    """Shapes that do not touch; at least so many, of at least so many kinds and colours."""

    def wanted(scene: Scene) -> bool:
        return len(scene.shapes) >= least and len(scene.kinds) >= kinds and len(scene.colors) >= colors

    return draw_until(rng, count_spec, wanted)


def pair_scene(rng: random.Random) -> Scene:
    """Two shapes with a clear relation."""
    return Scene(spatial_spec(rng))
