"""What an image takes of memory while it is opened, in a process of its own: bytes per pixel, beside its file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.helpers.hostile_images import ORIENTATION, PHOTOGRAPHS
from tests.helpers.image_files import encoded

from fusion_hf.model.image_limits_fusion import DECODER_COSTS, MAX_DECODING_SECONDS, WEBP

SIDE = 2000  # pixels
SLACK = 2**22  # bytes: what the interpreter and the blocks take
# Opens a small image of the format first, which loads its library, then forgets the peak so far.
MEASURE = """
import json, re, sys
from pathlib import Path
from fusion_hf.model.image_opening_fusion import open_image

def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

small, file = sys.argv[1:]
open_image(small)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
image = open_image(file)
peak = memory("VmHWM") - before - Path(file).stat().st_size
print(json.dumps({"pixels": image.width * image.height, "peak": peak}))
"""


def gray(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif


DEFLATE = {"compression": "tiff_adobe_deflate"}
LOSSY = {"irreversible": True, "quality_layers": [30]}
# by name: how an image is written, and the bytes per pixel that the guide states
FILES = {
    "rgb.jpg": (lambda image: encoded(image, "JPEG"), 4),
    "rgb-progressive.jpg": (lambda image: encoded(image, "JPEG", progressive=True, subsampling=0), 10),
    "cmyk.jpg": (lambda image: encoded(image.convert("CMYK"), "JPEG"), 8),
    "turned.jpg": (lambda image: encoded(image, "JPEG", exif=turned()), 8),
    "rgb.png": (lambda image: encoded(image, "PNG", compress_level=1), 4),
    "rgba.png": (lambda image: encoded(image.convert("RGBA"), "PNG", compress_level=1), 8),
    "la.png": (lambda image: encoded(image.convert("LA"), "PNG", compress_level=1), 8),
    "l.png": (lambda image: encoded(image.convert("L"), "PNG", compress_level=1), 5),
    "1.png": (lambda image: encoded(image.convert("1"), "PNG", compress_level=1), 5),
    "p.png": (lambda image: encoded(image.quantize(64), "PNG", compress_level=1), 5),
    "i16.png": (lambda image: encoded(Image.fromarray(gray(image) * np.uint16(257)), "PNG", compress_level=1), 7),
    "p.gif": (lambda image: encoded(image.quantize(64), "GIF"), 5),
    "rgb.bmp": (lambda image: encoded(image, "BMP"), 4),
    "rgb.ppm": (lambda image: encoded(image, "PPM"), 4),
    "rgb.tif": (lambda image: encoded(image, "TIFF", **DEFLATE), 5),
    "turned.tif": (lambda image: encoded(image, "TIFF", tiffinfo={ORIENTATION: 6}, **DEFLATE), 9),
    "cmyk.tif": (lambda image: encoded(image.convert("CMYK"), "TIFF", **DEFLATE), 9),
    "i16.tif": (lambda image: encoded(Image.fromarray(gray(image) * np.uint16(257)), "TIFF", **DEFLATE), 7),
    "i16b.tif": (lambda image: encoded(Image.fromarray((gray(image) * np.uint16(257)).astype(">u2")), "TIFF"), 7),
    "i32.tif": (lambda image: encoded(Image.fromarray(gray(image) * np.int32(257)), "TIFF", **DEFLATE), 9),
    "f32.tif": (lambda image: encoded(Image.fromarray(gray(image).astype(np.float32)), "TIFF", **DEFLATE), 9),
    "l.jp2": (lambda image: encoded(image.convert("L"), "JPEG2000", **LOSSY), 7),
    "rgb.jp2": (lambda image: encoded(image, "JPEG2000", **LOSSY), 20),
    "rgb.webp": (lambda image: encoded(image, "WEBP", method=0), 17),
    "rgba.webp": (lambda image: encoded(image.convert("RGBA"), "WEBP", lossless=True, method=0), 20),
}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return PHOTOGRAPHS[0].resize((SIDE, SIDE))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("name", FILES)
def test_peak_bytes_per_pixel(name: str, photo: Image.Image, tmp_path: Path):
    write, allowed = FILES[name]
    small, file = tmp_path / "small", tmp_path / name
    small.write_bytes(write(PHOTOGRAPHS[0]))
    file.write_bytes(write(photo))
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(small), str(file)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert measured["pixels"] == SIDE**2
    assert measured["peak"] < allowed * measured["pixels"] + SLACK


def test_what_takes_most_has_fewest_pixels():
    """So that no image takes more than 90 million pixels of nine bytes do."""
    for decoder, bytes_per_pixel in ((WEBP, 20), ("jpeg2k", 20)):
        most = MAX_DECODING_SECONDS * 1e9 / DECODER_COSTS[decoder].per_pixel
        assert most * bytes_per_pixel < 9 * 89_478_485
