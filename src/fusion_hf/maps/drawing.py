"""Drawing of maps over their image with matplotlib, which is imported when the first map is drawn."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from fusion_hf.common.extras import require
from fusion_hf.maps.attention import AttentionMaps
from fusion_hf.maps.view import Maps, Word

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_SIDE = 512  # pixels of a drawn image
PANEL = 3.0  # inches
DPI = 100
OPACITY = 0.65
COLORS, WHITE = "inferno", 255
LONGEST_NAME = 24  # characters of a word in a file name


def check_matplotlib() -> None:
    """Check that matplotlib is installed. Otherwise, raise an `InputError` that names the extra."""
    require(("matplotlib",), "Drawing maps", "maps")


def draw_overlay(image: Image.Image, maps: Maps, word: Word, title: str = "") -> "Figure":
    """
    Draw an image and, beside it, the maps of one word over the image, one for each group of layers.

    Args:
        image: The image.
        maps: Maps of the image.
        word: Word whose map is drawn.
        title: Title of the figure.

    Returns:
        The figure. Its colours begin at zero.

    Raises:
        InputError: If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    scale = LONGEST_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    shown = image.resize((width, height))
    overlays = maps.on_image(word, (width, height))  # (G, height, width)
    figure = Figure(figsize=(PANEL * (1 + len(overlays)), PANEL), dpi=DPI, layout="constrained")
    first, *panels = figure.subplots(1, 1 + len(overlays))
    first.imshow(shown)
    first.set_axis_off()
    for axes, overlay, layers in zip(panels, overlays, maps.layers, strict=True):
        axes.imshow(shown.convert("L"), cmap="gray", vmin=0, vmax=WHITE)  # gray, so that only the map has colours
        drawn = axes.imshow(overlay, cmap=COLORS, vmin=0, alpha=OPACITY)
        axes.set_title(f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}")
        axes.set_axis_off()
        figure.colorbar(drawn, ax=axes, shrink=0.7)
    figure.suptitle(title)
    return figure


def save_overlays(result: AttentionMaps, image: Image.Image, folder: Path) -> list[Path]:
    """
    Save a PNG file for each word of the question, the latent tokens of each turn, and each word of the answer.

    Args:
        result: The maps.
        image: The image.
        folder: Folder for the files, which is created if necessary.

    Returns:
        Paths of the files.

    Raises:
        InputError: If matplotlib is not installed.
    """
    check_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, maps in result.kinds().items():
        if len(maps.layers) == 0:  # a model without samplers
            continue
        for number, word in enumerate(maps.words, start=1):
            name = re.sub(r"\W+", "-", word.text).strip("-")[:LONGEST_NAME]
            path = folder / "-".join(part for part in (kind, f"{number:02}", name) if part)
            paths.append(path.with_name(f"{path.name}.png"))
            figure = draw_overlay(image, maps, word, f"{kind}: {word.text}".replace("$", r"\$"))
            figure.savefig(paths[-1], metadata={"Software": None})
    return paths
