"""Small files that cost much to decode."""

import struct
import zlib

from PIL import Image
from tests.helpers.image_files import encoded, png_of

GREY, ONE_BIT = 0, 1  # of a PNG's header


def one_bit_png(side: int) -> bytes:
    """A black PNG file of one bit per pixel: 10,000 x 10,000 pixels are 12 KB."""
    row = bytes(1 + -(-side // 8))
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, ONE_BIT, GREY, 0, 0, 0)
    return png_of([(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")])


def flat(kind: str, side: int) -> bytes:
    """A black image of a format that decodes it with the interpreter's lock held, such as JPEG2000."""
    return encoded(Image.new("RGB", (side, side)), kind)
