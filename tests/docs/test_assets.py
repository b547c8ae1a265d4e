"""The image of the demo is drawn by this package."""

from pathlib import Path

import numpy as np
from PIL import Image

from fusion_hf.drawing.drawn_images import DrawnImage, DrawnShape

RED_CIRCLE = DrawnImage(
    "single", background=(244, 241, 236), shapes=(DrawnShape("circle", "red", left=36, top=40, width=52, height=52),)
)


def test_red_circle(root: Path):
    with Image.open(root / "docs" / "assets" / "red_circle.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(RED_CIRCLE.render()))
