"""Small files that cost much to decode."""

import io
import struct
import zlib

from PIL import Image
from tests.helpers.serving import png_chunk

START_OF_SCAN, END_OF_IMAGE, HUFFMAN_TABLE = 0xDA, 0xD9, 0xC4
RESTARTS = range(0xD0, 0xD8)
GREY, ONE_BIT = 0, 1  # of a PNG's header


def jpeg_of_many_scans(side: int, size: int) -> bytes:
    """A grey progressive JPEG of about `size` bytes, most of them refinement scans that change nothing."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True, quality=50)
    content = file.getvalue()
    segments = _jpeg_segments(content)
    last = max(index for index, (marker, _) in enumerate(segments) if marker == START_OF_SCAN)
    first = last
    while segments[first - 1][0] == HUFFMAN_TABLE:
        first -= 1
    body = b"".join(segment for _, segment in segments)
    scan = b"".join(segment for _, segment in segments[first : last + 1])
    return content[:2] + body + scan * ((size - len(body)) // len(scan)) + bytes([0xFF, END_OF_IMAGE])


def _jpeg_segments(content: bytes) -> list[tuple[int, bytes]]:
    """Markers and their segments between the file's first and last marker; a scan's data are in its segment."""
    segments, index = [], 2
    while content[index + 1] != END_OF_IMAGE:
        marker = content[index + 1]
        end = index + 2 + struct.unpack(">H", content[index + 2 : index + 4])[0]
        if marker == START_OF_SCAN:
            while not (content[end] == 0xFF and content[end + 1] not in (0, *RESTARTS)):
                end += 1
        segments.append((marker, content[index:end]))
        index = end
    return segments


def one_bit_png(side: int) -> bytes:
    """A black PNG file of one bit per pixel: 10,000 x 10,000 pixels are 12 KB."""
    row = bytes(1 + -(-side // 8))
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, ONE_BIT, GREY, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def flat(kind: str, side: int) -> bytes:
    """A black image of a format that decodes it with the interpreter's lock held, such as JPEG2000."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, kind)
    return file.getvalue()
