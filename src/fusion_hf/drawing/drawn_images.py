"""Images drawn for `fusion-nano`: one shape, several shapes, two separate shapes, or a written word.

Everything is drawn on a canvas with twice the side of the image and reduced with a bilinear filter, which gives the
look of the images of easy-vqa (in its training images, edge pixels have the weights 1/8, 1/2, 7/8). Other statistics
are measured as well: background channels are uniform in 230 to 255, and upright shapes have sizes that are uniform in
8 to 32 pixels and positions that are uniform inside the image.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

IMAGE_SIDE = 64  # pixels, as in easy-vqa
CANVAS_SIDE = 2 * IMAGE_SIDE  # all coordinates below are canvas pixels

SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
# Yellow letters on a light background are hard to read for people, too.
WORD_COLORS = tuple(color for color in COLORS if color != "yellow")
# Words of the same length differ in at least two letters.
WORDS = tuple(
    "bed box bus cat cup dog egg ice jam key map owl pen sun toy zoo "
    "bird book door fish frog gold kite lamp milk moon rain road ship star tree wolf "
    "apple bread chair cloud field night piano pilot plant river shirt stone table tiger train zebra".split()
)
WHITE = 255
DIRECTIONS = ("left", "right", "above", "below")
MAX_COUNT = 5

BACKGROUND_RANGE = (230, 255)
SINGLE_SIZE_RANGE = (16, 64)
COUNT_SIZE_RANGE = (18, 32)
COUNT_GRID = 3  # shapes of a counting image are in different cells of a COUNT_GRID x COUNT_GRID grid
COUNT_MARGIN = 2
SPATIAL_SIZE_RANGE = (20, 44)
SPATIAL_GAP = 6  # free canvas pixels between two shapes along the axis in the answer
SPATIAL_SLOPE = 0.5  # maximum offset along the other axis, as a share of the offset along the axis in the answer
# Each word has one size, the largest that fits up to this one. With sizes that vary by a third, a small model needs
# several times the training to distinguish the words.
WORD_SIZE = 64
WORD_MARGIN = 4
SAME_KIND_SHARE = 0.5  # share of counting images with a single kind of shape
SAME_COLOR_SHARE = 0.5  # share of counting images with a single colour

TRIANGLE_ASPECT = 3**0.5 / 2  # height of an equilateral triangle of side 1

Category = Literal["single", "count", "spatial", "text"]
Split = Literal["train", "validation", "test"]
CATEGORIES: tuple[Category, ...] = ("single", "count", "spatial", "text")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class DrawnShape:
    """One coloured shape. Its box is in canvas pixels."""

    kind: str
    color: str
    left: float
    top: float
    width: float
    height: float

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class DrawnWord:
    """One written word. `left` and `top` are the corner of the ink, and `size` is the font size, in canvas pixels."""

    text: str
    color: str
    size: int
    left: int
    top: int

    @property
    def origin(self) -> tuple[int, int]:
        """Position at which Pillow starts to write, which differs from the corner of the ink."""
        left, top, _, _ = _ink_box(self.text, self.size)
        return self.left - left, self.top - top


@dataclass(frozen=True)
class DrawnElement:
    """A shape or letter of an image: its colour, its kind or letter, and its position, which is white in `mask`."""

    color: str
    name: str
    mask: Image.Image


@dataclass(frozen=True)
class DrawnImage:
    """All information that is needed to draw an image and to answer questions about it."""

    category: Category
    background: tuple[int, int, int]
    shapes: tuple[DrawnShape, ...] = ()
    word: DrawnWord | None = None

    def parts(self) -> list[DrawnElement]:
        """List the shapes, or the letters of the word, with masks of `CANVAS_SIDE` x `CANVAS_SIDE` pixels."""
        parts = []
        for shape in self.shapes:
            parts.append(DrawnElement(shape.color, shape.kind, Image.new("L", (CANVAS_SIDE, CANVAS_SIDE))))
            _draw_shape(ImageDraw.Draw(parts[-1].mask), shape, WHITE)
        if self.word is not None:
            font, (left, top) = _font(self.word.size), self.word.origin
            for index, letter in enumerate(self.word.text):
                parts.append(DrawnElement(self.word.color, letter, Image.new("L", (CANVAS_SIDE, CANVAS_SIDE))))
                corner = left + font.getlength(self.word.text[:index]), top
                ImageDraw.Draw(parts[-1].mask).text(corner, letter, WHITE, font=font)
        return parts

    def render(self) -> Image.Image:
        """Draw the image in mode RGB, with `IMAGE_SIDE` x `IMAGE_SIDE` pixels."""
        canvas = Image.new("RGB", (CANVAS_SIDE, CANVAS_SIDE), self.background)
        draw = ImageDraw.Draw(canvas)
        for shape in self.shapes:
            _draw_shape(draw, shape, COLORS[shape.color])
        if self.word is not None:
            draw.text(self.word.origin, self.word.text, COLORS[self.word.color], font=_font(self.word.size))
        return canvas.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)


def draw_spec(category: Category, split: Split, index: int, seed: int | str = 0) -> DrawnImage:
    """
    Plan an image. Splits are disjoint, because the name of the split is part of the random generator's seed.

    Args:
        category: A category in `CATEGORIES`.
        split: A split in `SPLITS`.
        index: Index of the image in its category and split.
        seed: Further part of the seed.

    Returns:
        The plan of the image.

    Raises:
        ValueError: If the category or the split is unknown.
    """
    if category not in CATEGORIES:
        raise ValueError(f"`category` must be one of {', '.join(CATEGORIES)}, got {category!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    return _SPEC_MAKERS[category](random.Random(f"{category}/{split}/{seed}/{index}"))


def direction(seen: DrawnShape, reference: DrawnShape) -> str | None:
    """
    Return the direction from one shape to another.

    Args:
        seen: Shape whose position is asked for.
        reference: Shape from which it is seen.

    Returns:
        One of `DIRECTIONS`, or None if the shapes are not clearly apart along one axis.
    """
    dx, dy = (a - b for a, b in zip(seen.center, reference.center, strict=True))
    horizontal_gap = abs(dx) - (seen.width + reference.width) / 2
    vertical_gap = abs(dy) - (seen.height + reference.height) / 2
    if horizontal_gap >= SPATIAL_GAP and abs(dy) <= SPATIAL_SLOPE * abs(dx):
        return "left" if dx < 0 else "right"
    if vertical_gap >= SPATIAL_GAP and abs(dx) <= SPATIAL_SLOPE * abs(dy):
        return "above" if dy < 0 else "below"
    return None


def single_spec(rng: random.Random) -> DrawnImage:
    """Plan an image that resembles those of easy-vqa."""
    kind, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    width, height = _random_size(rng, kind, SINGLE_SIZE_RANGE)
    left, top = rng.uniform(0, CANVAS_SIDE - width), rng.uniform(0, CANVAS_SIDE - height)
    return DrawnImage("single", _random_background(rng), (_whole_shape(kind, color, left, top, width, height),))


def count_spec(rng: random.Random) -> DrawnImage:
    """Plan an image with one to `MAX_COUNT` shapes that do not touch each other."""
    count = rng.randint(1, MAX_COUNT)
    kinds = SHAPES if rng.random() >= SAME_KIND_SHARE else (rng.choice(SHAPES),)
    colors = tuple(COLORS) if rng.random() >= SAME_COLOR_SHARE else (rng.choice(tuple(COLORS)),)
    cell_side = CANVAS_SIDE / COUNT_GRID
    shapes = []
    for cell in rng.sample(range(COUNT_GRID**2), count):
        row, column = divmod(cell, COUNT_GRID)
        kind = rng.choice(kinds)
        width, height = _random_size(rng, kind, COUNT_SIZE_RANGE)
        left = column * cell_side + rng.uniform(COUNT_MARGIN, cell_side - width - COUNT_MARGIN)
        top = row * cell_side + rng.uniform(COUNT_MARGIN, cell_side - height - COUNT_MARGIN)
        shapes.append(_whole_shape(kind, rng.choice(colors), left, top, width, height))
    return DrawnImage("count", _random_background(rng), tuple(shapes))


def spatial_spec(rng: random.Random) -> DrawnImage:
    """Plan an image with two shapes of different kinds and colours that are clearly apart along one axis."""
    kinds, colors = rng.sample(SHAPES, 2), rng.sample(tuple(COLORS), 2)
    sizes = [_random_size(rng, kind, SPATIAL_SIZE_RANGE) for kind in kinds]
    along = rng.randrange(2)  # 0: side by side, 1: one above the other
    across = 1 - along
    reach = (sizes[0][along] + sizes[1][along]) / 2
    # Rounding to whole canvas pixels moves a distance by at most one, hence the extra pixel.
    along_distance = rng.uniform(reach + SPATIAL_GAP + 1, CANVAS_SIDE - reach)
    across_reach = (sizes[0][across] + sizes[1][across]) / 2
    across_limit = min(SPATIAL_SLOPE * (along_distance - 1) - 1, CANVAS_SIDE - across_reach)
    offset = [0.0, 0.0]
    offset[along] = along_distance
    offset[across] = rng.uniform(-across_limit, across_limit)
    starts = [_random_starts(rng, offset[axis], sizes[0][axis], sizes[1][axis]) for axis in range(2)]
    shapes = [
        _whole_shape(kinds[i], colors[i], starts[0][i], starts[1][i], sizes[i][0], sizes[i][1]) for i in range(2)
    ]
    rng.shuffle(shapes)
    return DrawnImage("spatial", _random_background(rng), tuple(shapes))


def text_spec(rng: random.Random) -> DrawnImage:
    """Plan an image with one word of `WORDS`, completely inside the image."""
    word = place_word(rng.choice(WORDS), rng.choice(WORD_COLORS), rng)
    return DrawnImage("text", _random_background(rng), word=word)


def place_word(
    text: str, color: str, rng: random.Random, largest: int = WORD_SIZE, top: int = 0, bottom: int = CANVAS_SIDE
) -> DrawnWord:
    """
    Place a word at a random position, with the largest font size that fits.

    Args:
        text: The word.
        color: Its colour, a key of `COLORS`.
        rng: Random generator.
        largest: Maximum font size.
        top, bottom: Range for the word, in canvas pixels.
    """
    size = _word_size(text, largest)
    _, _, width, height = _ink_box(text, size)
    left = WORD_MARGIN + rng.randint(0, CANVAS_SIDE - 2 * WORD_MARGIN - width)
    return DrawnWord(
        text, color, size, left, top + WORD_MARGIN + rng.randint(0, bottom - top - 2 * WORD_MARGIN - height)
    )


_SPEC_MAKERS: dict[Category, Callable[[random.Random], DrawnImage]] = {
    "single": single_spec,
    "count": count_spec,
    "spatial": spatial_spec,
    "text": text_spec,
}


def _random_background(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(*BACKGROUND_RANGE), rng.randint(*BACKGROUND_RANGE), rng.randint(*BACKGROUND_RANGE)


def _random_size(rng: random.Random, kind: str, size_range: tuple[int, int]) -> tuple[float, float]:
    """Draw a width and a height, which are equal for circles and fixed in proportion for triangles."""
    width = rng.randint(*size_range)
    if kind == "rectangle":
        return width, rng.randint(*size_range)
    if kind == "triangle":
        return width, width * TRIANGLE_ASPECT
    return width, width


def _random_starts(rng: random.Random, offset: float, first: float, second: float) -> tuple[float, float]:
    """Draw the starts of two intervals with given lengths inside the canvas, whose centres differ by `offset`."""
    shift = offset + (first - second) / 2  # between the starts
    low, high = max(0.0, -shift), min(CANVAS_SIDE - first, CANVAS_SIDE - second - shift)
    start = rng.uniform(low, high)
    return start, start + shift


def _whole_shape(kind: str, color: str, left: float, top: float, width: float, height: float) -> DrawnShape:
    """Create a shape whose corner lies on whole canvas pixels, as in easy-vqa."""
    return DrawnShape(kind, color, round(left), round(top), width, height)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: DrawnShape, color: int | tuple[int, int, int]) -> None:
    left, top, right, bottom = shape.left, shape.top, shape.left + shape.width, shape.top + shape.height
    if shape.kind == "circle":
        draw.ellipse((left, top, right, bottom), fill=color)
    elif shape.kind == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=color)
    else:
        draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=color)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load Pillow's own font, so that every machine draws the same letters without another package."""
    return ImageFont.load_default(size)


@cache
def _word_size(text: str, largest: int) -> int:
    """Return the largest font size up to `largest` at which a word fits in the canvas."""
    room = CANVAS_SIDE - 2 * WORD_MARGIN
    return next(size for size in range(largest, 0, -1) if _ink_box(text, size)[2] <= room)


@cache
def _ink_box(text: str, size: int) -> tuple[int, int, int, int]:
    """Return the left and top bearing of the ink, its width and its height."""
    left, top, right, bottom = _font(size).getbbox(text)
    return int(left), int(top), int(right - left), int(bottom - top)
