"""Files of images: PNGs with texts about themselves, and a pair as one image."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from PIL import Image, PngImagePlugin

GAP = 16  # pixels between the two, at a height of 512
GAP_HEIGHT = 512
WHITE = (255, 255, 255)


def compose_pair(left: Image.Image, right: Image.Image) -> Image.Image:
    """Put two images side by side, the right one in the left one's height, with a white gap between them."""
    left, right = left.convert("RGB"), right.convert("RGB")
    if right.height != left.height:
        width = max(round(right.width * left.height / right.height), 1)
        right = right.resize((width, left.height), Image.Resampling.BICUBIC)
    gap = max(round(GAP * left.height / GAP_HEIGHT), 1)
    whole = Image.new("RGB", (left.width + gap + right.width, left.height), WHITE)
    whole.paste(left, (0, 0))
    whole.paste(right, (left.width + gap, 0))
    return whole


def encode_png(image: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    """Write a PNG with texts about itself."""
    info = PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, text)
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def read_texts(path: Path) -> dict[str, str] | None:
    """Read the texts in a PNG; None if there is no such file."""
    if not path.exists():
        return None
    with Image.open(path, formats=("PNG",)) as image:
        return {name: str(text) for name, text in image.info.items()}
