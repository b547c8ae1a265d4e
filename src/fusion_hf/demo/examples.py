"""Images to begin with, of the kinds that fusion-nano knows, drawn when the page is built."""

from typing import NamedTuple

from PIL import Image

from fusion_hf.drawing.drawn_images import Category, draw_spec


class Example(NamedTuple):
    """An image and a question about it."""

    image: Image.Image
    question: str


# index of an image among those of its category in the test split, which no model was trained on
CHOSEN: tuple[tuple[Category, int, str], ...] = (
    ("single", 0, "what color is the shape?"),
    ("count", 1, "how many circles are there?"),
    ("spatial", 1, "where is the circle, seen from the rectangle?"),
    ("text", 1, "what word is written?"),
)


def draw_examples() -> list[Example]:
    """Draw the chosen examples."""
    return [Example(draw_spec(category, "test", index).render(), question) for category, index, question in CHOSEN]
