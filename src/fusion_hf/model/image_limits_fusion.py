"""Limits on what decoding an image file may cost, checked before PIL decodes it.

The parts of the file are counted and the time that the decoder needs is estimated.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

from PIL import Image, ImageFile

MAX_DECODING_SECONDS = 2.0
# Each read of a file is a step of a loop in one of PIL's plugins; a step takes up to 2 microseconds.
MAX_READS, BYTES_PER_FURTHER_READ = 2**19, 2**10
# A scan of a progressive JPEG visits every pixel, however few bytes it has: 0.55 ns per pixel. Encoders write 3 to 20.
MIN_JPEG_SCANS, MAX_JPEG_SCANS, JPEG_SCAN_PIXELS = 20, 100, 2**31
MAX_TAG_VALUES = 2**18  # in a TIFF or an EXIF block: PIL creates a Python object for each value
SPARE_TAG_BYTES = 2**16
MAX_TILE_PIXELS = 2**22  # of a TIFF whose image has fewer pixels
MAX_CODESTREAM_TILES = 2**12  # of a JPEG2000: each tile takes kilobytes before it is decoded
MIN_CODE_BLOCK_SIDES, MIN_PRECINCT_SIDE = 8, 4  # exponents of two; the first is the sum for both sides of a code block
SMALL_CODESTREAM_PIXELS = 2**16  # smaller images may have parts of any size
MAX_COMMENTS = 1000  # of a plain PPM: PIL copies the file for each comment


class ImageError(ValueError):
    """
    An image that cannot be used. The same file gives the same reason wherever it is opened.

    Args:
        reason (`str`): A clause about the image that begins with "it" or "its", without a full stop.
        image (`str`): Subject of the message. It names the image where there are several.
    """

    def __init__(self, reason: str, image: str = "The image"):
        super().__init__(f"{image} cannot be used: {reason}.")
        self.reason, self.image = reason, image

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, self.image)  # the error may cross processes


class OversizedImage(ImageError):
    """An image with more pixels, bytes or parts than allowed, or one that takes too long to decode."""


class BoundedStream(BytesIO):
    """The bytes of an image file, which can be read only a limited number of times."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self.reads = 0
        self.allow(MAX_READS + len(content) // BYTES_PER_FURTHER_READ)

    def allow(self, reads: int) -> None:
        """Set the number of further reads that are allowed."""
        self.allowed = self.reads + reads

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as `BytesIO` does and count the reads."""
        self.reads += 1
        if self.reads > self.allowed:
            raise OversizedImage(f"it has too many parts: decoding it takes more than {self.allowed} reads")
        return super().read(size)


@dataclass(frozen=True)
class DecoderCost:
    """Nanoseconds that a decoder takes per pixel and per byte of the file, as measured and rounded up."""

    per_pixel: float
    per_byte: float = 0.0

    def seconds(self, pixels: int, size: int) -> float:
        """
        Estimate the time that decoding takes.

        Args:
            pixels (`int`): Number of pixels of the image.
            size (`int`): Size of its file in bytes.

        Returns:
            `float`: The time in seconds.
        """
        return (self.per_pixel * pixels + self.per_byte * size) / 1e9


LZMA_TIFF, WEBP, LAB = "lzma", "WEBP", "LAB"
# Decoders that are not listed take at most 40 ns per pixel. PIL runs the decoders in `PLUGIN_LOOPS` in Python.
DECODER_COSTS = {
    "jpeg2k": DecoderCost(100, 250),
    WEBP: DecoderCost(80),  # at most 54 ns, but it also takes 20 bytes of memory per pixel
    LZMA_TIFF: DecoderCost(20, 120),
    LAB: DecoderCost(150),  # conversion by a colour profile
    "bmp_rle": DecoderCost(200, 300),
    "ppm": DecoderCost(2500),
    "ppm_plain": DecoderCost(30, 350),
}
PLUGIN_LOOPS = ("bmp_rle", "ppm", "ppm_plain")


def check_decoder(image: Image.Image, size: int) -> None:
    """
    Check that decoding an image does not take too long.

    Args:
        image (`PIL.Image.Image`): Image that `Image.open` returned and that is not decoded yet.
        size (`int`): Size of its file in bytes.

    Raises:
        OversizedImage: If the estimate exceeds `MAX_DECODING_SECONDS`. The message names both times.
    """
    if not isinstance(image, ImageFile.ImageFile):
        return
    decoder = WEBP if image.format == WEBP else image.tile[0][0] if image.tile else None  # WebP sets its tile late
    if decoder == "libtiff":
        decoder = image.info.get("compression")
    decoder = LAB if image.mode == LAB and image.tile else decoder
    cost = DECODER_COSTS.get(decoder) if isinstance(decoder, str) else None
    if cost is None:
        return
    pixels = image.width * image.height
    seconds = cost.seconds(pixels, size)
    if seconds > MAX_DECODING_SECONDS:
        raise OversizedImage(
            f"it is a {image.format} image with {pixels} pixels in {size} bytes and takes about {seconds:.1f} s to "
            f"decode, more than {MAX_DECODING_SECONDS:g} s"
        )
    if decoder in PLUGIN_LOOPS and isinstance(image.fp, BoundedStream):
        image.fp.allow(2 * (pixels + size))


def check_parts(content: bytes) -> None:
    """
    Check that the parts of a file do not cost much more time or memory than its size suggests.

    PIL refuses files that this function does not understand.

    Args:
        content (`bytes`): Content of the file.

    Raises:
        OversizedImage: If a part occurs too often. The message names the number and the limit.
    """
    if content.startswith(b"\xff\xd8\xff"):
        _check_jpeg(content)
    elif content.startswith((b"II", b"MM")):
        _check_tiff(content)
    elif content.startswith((b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP")):
        _check_jpeg2000(content)
    elif re.match(rb"P[123]\s", content):
        _check_number("comments", content.count(b"#"), MAX_COMMENTS)


def _check_number(name: str, number: int, allowed: int) -> None:
    if number > allowed:
        raise OversizedImage(f"it has {number} {name}, more than the limit of {allowed}")


# JPEG

NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # stuffed bytes and restart markers belong to a scan
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01
ARITHMETIC_FRAMES = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # their scans take twice the time
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, *ARITHMETIC_FRAMES}
EXIF, EXTENDED_EXIF, MULTI_PICTURE = b"Exif\0\0", 0xE1, 0xE2
MPF = b"MPF\0"


def _check_jpeg(content: bytes) -> None:
    """Check that the scans fit the pixels, and check the tags of EXIF and of the index of a multi-picture file."""
    scans = pixels = 0
    is_arithmetic = False
    exif = b""
    for marker, begin, end in _jpeg_segments(content):
        if marker == SOS:
            scans += 1
        elif marker in FRAMES and end - begin >= 5:
            height, width = struct.unpack_from(">HH", content, begin + 1)
            pixels = max(pixels, width * height)
            is_arithmetic |= marker in ARITHMETIC_FRAMES
        elif marker == EXTENDED_EXIF and content.startswith(EXIF, begin):
            exif += content[begin + len(EXIF) : end]
        elif marker == MULTI_PICTURE and content.startswith(MPF, begin):
            check_tags(content[begin + len(MPF) : end])
    _check_number("scans", scans, MIN_JPEG_SCANS if is_arithmetic else max_jpeg_scans(pixels))
    check_tags(exif)


def max_jpeg_scans(pixels: int) -> int:
    """Return how many scans a JPEG with `pixels` pixels may have."""
    return min(MAX_JPEG_SCANS, max(MIN_JPEG_SCANS, JPEG_SCAN_PIXELS // max(pixels, 1)))


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each marker up to the end of the first image, with the begin and end of its segment's content."""
    position = 2
    while (match := NEXT_MARKER.search(content, position)) is not None:
        marker, begin = content[match.end() - 1], match.end()
        if marker == EOI:
            return
        if marker in (SOI, TEM):
            position = begin
            continue
        if begin + 2 > len(content):
            return
        end = begin + max(struct.unpack_from(">H", content, begin)[0], 2)
        yield marker, begin + 2, min(end, len(content))
        position = end


# TIFF and EXIF

# size of a value in bytes, by the number of its type; PIL creates no objects for single bytes
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TILE_WIDTH, TILE_LENGTH, COMPRESSION = 322, 323, 259
JPEG_COMPRESSIONS = (6, 7)


class Tag(NamedTuple):
    """An entry of a directory with `values` values of `size` bytes. `first` is known if it is a whole number."""

    number: int
    size: int
    values: int
    first: int | None


def check_tags(content: bytes) -> list[Tag]:
    """
    Check that the first directory of a TIFF or EXIF block claims no more than the block can hold.

    Tags may share their bytes, so a small block can claim a lot of memory.

    Args:
        content (`bytes`): The block.

    Returns:
        `list[Tag]`: The tags that can be read.

    Raises:
        OversizedImage: If the tags claim too many values or bytes. The message names the number and the limit.
    """
    tags = list(_read_tags(content))
    _check_number("values in its tags", sum(tag.values for tag in tags if tag.size > 1), MAX_TAG_VALUES)
    size = sum(tag.values * tag.size for tag in tags)
    _check_number("bytes in its tags", size, 2 * len(content) + SPARE_TAG_BYTES)
    return tags


def _read_tags(content: bytes) -> Iterator[Tag]:
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        return
    is_big = content[2:4] in (b"\x2b\0", b"\0\x2b")
    head, entry, offset_size = ("QQ", "HHQ", 8) if is_big else ("IH", "HHI", 4)
    try:
        (offset,) = struct.unpack_from(order + head[0], content, 8 if is_big else 4)
        (entries,) = struct.unpack_from(order + head[1], content, offset)
    except (struct.error, OverflowError):
        return
    begin = offset + struct.calcsize(order + head[1])
    length = struct.calcsize(order + entry) + offset_size
    for place in range(begin, min(begin + entries * length, len(content) - length + 1), length):
        number, kind, count = struct.unpack_from(order + entry, content, place)
        size = TYPE_SIZES.get(kind, 1)
        value = content[place + length - offset_size : place + length]
        first = struct.unpack(order + "H", value[:2])[0] if kind == 3 else None
        first = struct.unpack(order + "I", value[:4])[0] if kind in (4, 13) else first
        # PIL does not read values that would end behind the file
        yield Tag(number, size, count if count * size <= len(content) else 0, first)


def _check_tiff(content: bytes) -> None:
    firsts = {tag.number: tag.first or 0 for tag in check_tags(content)}
    width, length = firsts.get(TILE_WIDTH, 0), firsts.get(TILE_LENGTH, 0)
    pixels = firsts.get(256, 0) * firsts.get(257, 0)
    _check_number("pixels in a tile", width * length, max(MAX_TILE_PIXELS, pixels))
    if firsts.get(COMPRESSION) in JPEG_COMPRESSIONS:
        # each strip is a separate JPEG
        scans = max(strip.count(b"\xff\xda") for strip in content.split(b"\xff\xd8\xff"))
        _check_number("scans in a strip", scans, max_jpeg_scans(pixels))


# JPEG2000

CODESTREAM = b"\xff\x4f\xff\x51"
COD, COC, SOT, SOD = 0xFF52, 0xFF53, 0xFF90, 0xFF93
MAX_CODESTREAMS = 16


def _check_jpeg2000(content: bytes) -> None:
    """Check every codestream, because a box may hold a second one."""
    _check_number("codestreams", content.count(CODESTREAM), MAX_CODESTREAMS)
    begin = content.find(CODESTREAM)
    while begin >= 0:
        _check_codestream(content, begin)
        begin = content.find(CODESTREAM, begin + 1)


def _check_codestream(content: bytes, begin: int) -> None:
    try:
        right, bottom, left, top, width, height, tile_left, tile_top, components = struct.unpack_from(
            ">8IH", content, begin + 8
        )
    except struct.error:
        return
    pixels = max(right - left, 0) * max(bottom - top, 0)
    if width and height:
        columns, rows = -(-(right - tile_left) // width), -(-(bottom - tile_top) // height)
        _check_number("tiles", columns * rows, MAX_CODESTREAM_TILES)
    if pixels <= SMALL_CODESTREAM_PIXELS:
        return
    for marker, start, end in _codestream_segments(content, begin + 2):
        if marker == COD:
            _check_coding(content[start:end], style=0, parameters=5)
        elif marker == COC:
            wide = components > 256
            _check_coding(content[start:end], style=1 + wide, parameters=2 + wide)


def _check_coding(segment: bytes, style: int, parameters: int) -> None:
    """Check the sizes of code blocks and precincts in a COD or COC segment: openjpeg allocates all of them at once."""
    if len(segment) < parameters + 5:
        return
    sides = (segment[parameters + 1] & 15) + (segment[parameters + 2] & 15) + 4
    precincts = segment[parameters + 6 :] if segment[style] & 1 else b""  # without that of the lowest resolution
    smallest = min((min(exponents & 15, exponents >> 4) for exponents in precincts), default=MIN_PRECINCT_SIDE)
    if sides < MIN_CODE_BLOCK_SIDES:
        smallest_block = 2**MIN_CODE_BLOCK_SIDES
        raise OversizedImage(f"its code blocks have {2**sides} pixels, fewer than the minimum of {smallest_block}")
    if smallest < MIN_PRECINCT_SIDE:
        raise OversizedImage(
            f"its precincts are {2**smallest} pixels wide or high, less than the minimum of {2**MIN_PRECINCT_SIDE}"
        )


def _codestream_segments(content: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """Yield each marker of the main and tile-part headers, with the begin and end of its segment's content."""
    next_part: int | None = None
    while position + 4 <= len(content):
        marker, length = struct.unpack_from(">HH", content, position)
        if marker == SOD:
            if next_part is None:
                return
            position, next_part = next_part, None
            continue
        if marker == SOT and position + 12 <= len(content):
            (part_length,) = struct.unpack_from(">I", content, position + 6)
            next_part = position + part_length if part_length >= 12 else None
        yield marker, position + 4, position + 2 + length
        position += 2 + max(length, 2)
