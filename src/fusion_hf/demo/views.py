"""What the page shows of a session, as images and text."""

from html import escape
from textwrap import shorten
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from PIL import Image

from fusion_hf.demo.demo_model import DemoTurn, Session
from fusion_hf.maps.drawing import COLORS, OPACITY
from fusion_hf.model.configuration_fusion import NUM_TILES, TILES_PER_SIDE

TILE_SIDE = 192  # pixels that a tile has at least on the page
SHOWN_SIDE = 400  # pixels that the longer side of an overlay has at least
GAP = 8  # pixels between tiles
LONGEST_NAME = 24  # characters of an answer in a list of answers
MILLISECONDS = 1000
UNKNOWN = "–"


class Tiles(NamedTuple):
    """The overview, and the four tiles in their places with gaps between them."""

    overview: Image.Image
    quarters: Image.Image


def draw_tiles(tiles: np.ndarray) -> Tiles:
    """Images of a session's tiles `(5, H, W, 3)`, with all their pixels."""
    height, width = tiles.shape[1:3]
    factor = -(-TILE_SIDE // min(height, width))
    images = [
        Image.fromarray(tile).resize((factor * width, factor * height), Image.Resampling.NEAREST) for tile in tiles
    ]
    width, height = images[0].size
    size = (TILES_PER_SIDE * width + GAP, TILES_PER_SIDE * height + GAP)
    quarters = Image.new("RGBA", size)  # transparent gaps
    for index, image in enumerate(images[:NUM_TILES]):
        row, column = divmod(index, TILES_PER_SIDE)
        quarters.paste(image, (column * (width + GAP), row * (height + GAP)))
    return Tiles(images[NUM_TILES].resize(size, Image.Resampling.NEAREST), quarters)


def draw_overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Draw the image in grey under a map `(H, W)` in colours, which begin at zero."""
    factor = -(-SHOWN_SIDE // max(image.size))
    size = (factor * image.width, factor * image.height)
    colors = Image.fromarray(colormaps[COLORS](Normalize(vmin=0)(heat), bytes=True)[..., :3])
    gray = image.convert("L").convert("RGB").resize(size, Image.Resampling.NEAREST)
    return Image.blend(gray, colors.resize(size, Image.Resampling.BILINEAR), OPACITY)


def chat_messages(session: Session | None, question: str = "", answer: str = "") -> list[dict[str, str]]:
    """The conversation, and a question that is being answered, as gradio's chat takes it: HTML of plain text."""
    turns = [] if session is None else [(turn.question, turn.answer) for turn in session.turns]
    if question:
        turns.append((question, answer))
    roles = ("user", "assistant")
    said = [(role, text) for turn in turns for role, text in zip(roles, turn, strict=True) if text]
    return [{"role": role, "content": escape(text, quote=False)} for role, text in said]


def answer_choices(turns: list[DemoTurn]) -> list[tuple[str, int]]:
    """Return a short name of each answer, and its place."""
    names = (shorten(turn.answer, LONGEST_NAME, placeholder=" ...") for turn in turns)
    return [(f"{index + 1}: {name}", index) for index, name in enumerate(names)]


def times_table(session: Session | None) -> str:
    """Return what the image and each answer took, as a Markdown table; the latest answer comes first."""
    if session is None:
        return ""
    first = (
        f"The image took {_ms(session.times.preprocessing)} to preprocess and {_ms(session.times.encoding)} to encode "
        "(its four tiles)."
    )
    if not session.turns:
        return first
    head = "| answer | first token | tokens | tokens/s |\n|---:|---:|---:|---:|"
    rows = [_row(number, turn) for number, turn in enumerate(session.turns, start=1)]
    return "\n".join([first, "", head, *reversed(rows)])


def _row(number: int, turn: DemoTurn) -> str:
    speed = turn.times.tokens_per_second
    shown = UNKNOWN if speed is None else f"{speed:.1f}"
    return f"| {number} | {_ms(turn.times.first_token)} | {turn.times.tokens} | {shown} |"


def _ms(seconds: float) -> str:
    return f"{seconds * MILLISECONDS:.0f} ms"
