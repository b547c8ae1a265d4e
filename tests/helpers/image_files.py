"""Image files, put together from their parts."""

import io
import struct
import zlib

from PIL import Image

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The file of an image."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg_segments(content: bytes) -> list[bytes]:
    """Markers with their segments, and scans with what follows them."""
    segments, index = [], 2
    while index + 4 <= len(content) and content[index + 1] != EOI[1]:
        end = index + 2 + struct.unpack(">H", content[index + 2 : index + 4])[0]
        if content[index + 1] == 0xDA:
            while end < len(content) - 1 and not (
                content[end] == 0xFF and content[end + 1] not in (0, *range(0xD0, 0xD8))
            ):
                end += 1
        segments.append(content[index:end])
        index = end
    return segments


def jpeg_of(segments: list[bytes]) -> bytes:
    """The opposite of `jpeg_segments`."""
    return SOI + b"".join(segments) + EOI


def jpeg_of_many_scans(side: int, scans: int | None = None, size: int = 0) -> bytes:
    """A gray progressive JPEG of so many scans, or of about so many bytes: most of its scans change nothing."""
    segments = jpeg_segments(encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=50))
    last = max(index for index, segment in enumerate(segments) if segment[1] == 0xDA)
    first = last
    while segments[first - 1][1] == 0xC4:
        first -= 1
    scan = segments[first : last + 1]
    if scans is None:
        repeats = (size - sum(map(len, segments))) // sum(map(len, scan))
    else:
        repeats = scans - sum(segment[1] == 0xDA for segment in segments)
    return jpeg_of(segments[: last + 1] + scan * repeats)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG, as far as it has them."""
    chunks, index = [], len(PNG_HEAD)
    while index + 8 <= len(content):
        (length,) = struct.unpack(">I", content[index : index + 4])
        chunks.append((content[index + 4 : index + 8], content[index + 8 : index + 8 + length]))
        index += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """The opposite of `png_chunks`, with sums that are right."""
    return PNG_HEAD + b"".join(chunk(kind, content) for kind, content in chunks)


def png_claiming(width: int, height: int | None = None, pixels: bytes = b"") -> bytes:
    """A PNG that claims a size (default: a square), and holds no more than `pixels`."""
    header = struct.pack(">IIBBBBB", width, width if height is None else height, 8, 2, 0, 0, 0)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")])


def insert_chunks(content: bytes, chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG with further chunks behind its header."""
    first, *rest = png_chunks(content)
    return png_of([first, *chunks, *rest])
