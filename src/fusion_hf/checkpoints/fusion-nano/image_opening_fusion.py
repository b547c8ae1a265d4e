"""Opening an image that a stranger made: one way to read, decode and convert, and one list of what can go wrong."""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from .image_limits_fusion import (
    WEBP,
    BoundedStream,
    ImageError,
    OversizedImage,
    check_decoder,
    check_parts,
    check_tags,
)

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # none whose reader starts another program
MAX_IMAGE_PIXELS = 89_478_485  # PIL warns above it
MAX_SIDE = 2**20  # PIL has a pointer for each row, which takes more than a narrow row itself
MAX_FILE_BYTES = 2**30  # more than any image of MAX_IMAGE_PIXELS has, compressed or not
# What PIL raises for files that are broken or made to break it, while it opens, decodes, or converts them.
BROKEN_IMAGE: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
SPEAKING = (EOFError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
GRAY_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
FLOAT_MODE = "F"
LARGEST_UINT8, LARGEST_UINT16 = 255, 65535
BLOCK_PIXELS = 2**16  # that are converted at a time
LONGEST_REASON = 200  # characters
ORIENTATION_TAG, UPRIGHT = 0x0112, 1  # EXIF
TIFF = "TIFF"
FORMATS_WITH_PARTS = ("JPEG", "JPEG2000", "MPO", "PPM", TIFF)  # that `check_parts` looks into


class Turn(NamedTuple):
    """How an image becomes upright, and where that puts its first column and row."""

    method: Image.Transpose
    mirrors_columns: bool
    mirrors_rows: bool
    swaps: bool = False

    def place(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Return the upper left corner, in the upright image, of a box of an image of `size`."""
        left = size[0] - box[2] if self.mirrors_columns else box[0]
        top = size[1] - box[3] if self.mirrors_rows else box[1]
        return (top, left) if self.swaps else (left, top)


# by EXIF orientation
TURNS = {
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: Turn(Image.Transpose.ROTATE_180, True, True),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: Turn(Image.Transpose.TRANSPOSE, False, False, swaps=True),
    6: Turn(Image.Transpose.ROTATE_270, False, True, swaps=True),
    7: Turn(Image.Transpose.TRANSVERSE, True, True, swaps=True),
    8: Turn(Image.Transpose.ROTATE_90, True, False, swaps=True),
}


def open_image(
    source: bytes | str | os.PathLike[str],
    max_pixels: int = MAX_IMAGE_PIXELS,
    max_bytes: int = MAX_FILE_BYTES,
    formats: Sequence[str] = FORMATS,
    exif_transpose: bool = True,
) -> Image.Image:
    """
    Open an image and bound what decoding may cost.

    Args:
        source: the content of a file, or its path.
        max_pixels: an image with more is refused before it is decoded.
        max_bytes: of the file.
        formats: that are read, by PIL's names.
        exif_transpose: turn the image upright by its EXIF orientation.

    Returns:
        The decoded image in mode RGB.

    Raises:
        ImageError: if the file cannot be read, or holds no image that can be used.
    """
    return decode_image(identify_image(read_file(source, max_bytes), formats, max_bytes), max_pixels, exif_transpose)


def read_file(source: bytes | str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """
    Read an image's file, which PIL opens from memory: from a path it takes other ways, and says other words.

    Raises:
        ImageError: if it cannot be read or has more than `max_bytes` bytes.
    """
    if isinstance(source, bytes):
        return source
    try:
        with Path(source).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(max_bytes + 1) if size <= max_bytes else b""
    except (OSError, ValueError) as error:  # the latter of a name with a null character
        raise ImageError(f"it cannot be read: {_shown(error)}") from error
    _check_size(max(size, len(content)), max_bytes)
    return content


def identify_image(
    content: bytes, formats: Sequence[str] = FORMATS, max_bytes: int = MAX_FILE_BYTES
) -> ImageFile.ImageFile:
    """
    Open an image without decoding it; `decode_image` does that.

    Raises:
        ImageError: if it is of none of the `formats`, or has too many bytes or parts.
    """
    _check_size(len(content), max_bytes)
    check_parts(content)
    with _reported():
        try:
            return Image.open(BoundedStream(content), formats=tuple(formats))
        except UnidentifiedImageError as error:
            raise ImageError(f"it cannot be decoded: it is none of {', '.join(formats)}, or is cut short") from error


def decode_image(image: Image.Image, max_pixels: int = MAX_IMAGE_PIXELS, exif_transpose: bool = True) -> Image.Image:
    """
    Decode an image of PIL, turn it upright, and convert it to RGB.

    Alpha is dropped, 16-bit gray and floats from 0 to 1 are scaled to 8 bits, the first frame of an animation is
    taken. An RGB image that is upright is returned itself. Otherwise the result is made in blocks: beside both images
    nothing is held.

    Args:
        image: decoded or not.
        max_pixels: an image with more is refused before it is decoded.
        exif_transpose: turn the image upright by its EXIF orientation. PIL itself turns TIFFs.

    Raises:
        ImageError: if it is broken, too expensive to decode, or of floats beyond 0 to 255.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise OversizedImage(
            f"it has {width} x {height} = {width * height} pixels; allowed: max_image_pixels = {max_pixels}"
        )
    if max(width, height) > MAX_SIDE:
        raise OversizedImage(f"it is {width} x {height} pixels; allowed: {MAX_SIDE} in a row or column")
    load_image(image)
    orientation = read_orientation(image) if exif_transpose else UPRIGHT
    with _reported():
        return _to_upright_rgb(image, TURNS.get(orientation))


def read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation of an image, 1 to 8; 1 (upright) if it cannot be read."""
    try:
        exif = image.info.get("exif")
        if isinstance(exif, bytes):
            check_tags(exif.removeprefix(b"Exif\0\0"))
        elif isinstance(profile := image.info.get("Raw profile type exif"), str):
            check_tags(bytes.fromhex("".join(profile.split("\n")[3:])).removeprefix(b"Exif\0\0"))
        orientation = image.getexif().get(ORIENTATION_TAG)
    except BROKEN_IMAGE:
        return UPRIGHT
    return orientation if isinstance(orientation, int) and orientation in TURNS else UPRIGHT


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OversizedImage(f"it has {size} bytes; allowed: {max_bytes}")


@contextmanager
def _reported() -> Iterator[None]:
    """Say in an `ImageError` what PIL raises."""
    try:
        yield
    except ImageError:
        raise
    except BROKEN_IMAGE as error:
        raise _broken(error) from error


def _broken(error: Exception) -> ImageError:
    if isinstance(error, Image.DecompressionBombError):
        return OversizedImage(f"it cannot be decoded: {_shown(error)}")
    if isinstance(error, MemoryError):
        return ImageError("it needs more memory than there is")
    return ImageError(f"it cannot be decoded: {_shown(error)}")


def _shown(error: Exception) -> str:
    """What PIL says, in one line without a full stop; the kind of error where that is all there is."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the file's name, which the caller knows
    text = " ".join(str(error).split()).rstrip(".")[:LONGEST_REASON] or type(error).__name__
    # the others are mishaps of PIL's own code, whose words say nothing about the file
    return text if isinstance(error, SPEAKING) else f"its structure is broken ({text})"


def load_image(image: Image.Image) -> None:
    """
    Decode the pixels of an image of PIL in place.

    Raises:
        ImageError: if it is broken, or too expensive to decode.
    """
    with _reported():
        # a copy (`copy.deepcopy`, or from another process) holds decoded pixels and knows no file
        if isinstance(image, ImageFile.ImageFile) and "fp" in vars(image):
            _load_file(image)
        else:
            image.load()


def _load_file(image: ImageFile.ImageFile) -> None:
    is_ours = isinstance(image.fp, BoundedStream)
    size = len(image.fp.getvalue()) if isinstance(image.fp, BoundedStream) else _check_file(image)
    check_decoder(image, size)
    if image.format == TIFF:
        _tame_tiff(image)
    if isinstance(image.info.get("transparency"), str):  # a text chunk of that name, which PIL would take for a colour
        del image.info["transparency"]
    image.load()
    if is_ours:
        image.fp = None  # of a WebP, it holds the pixels once more


def _check_file(image: ImageFile.ImageFile) -> int:
    """Check the file of an image that the caller has opened, and return its size; 0 if it is decoded and closed."""
    try:
        position = image.fp.tell() if image.fp is not None else 0
    except ValueError:  # it is closed
        position = 0
    if image.fp is None or (not image.tile and image.format != WEBP):
        return 0
    size = image.fp.seek(0, os.SEEK_END)
    if image.format in FORMATS_WITH_PARTS:
        image.fp.seek(0)
        check_parts(image.fp.read(MAX_FILE_BYTES))
    image.fp.seek(position)
    return size


def _tame_tiff(image: ImageFile.ImageFile) -> None:
    """Let PIL, which turns a TIFF while it decodes it, know the orientation alone: it fails on odd tags beside it."""
    try:
        exif = image.getexif()
    except BROKEN_IMAGE:
        exif = image.getexif()  # now it is what could be read
    try:
        orientation = exif.get(ORIENTATION_TAG)
    except BROKEN_IMAGE:
        orientation = None
    exif.load(b"")
    if orientation is not None:
        exif[ORIENTATION_TAG] = orientation
    if not isinstance(image.info.get("xmp", b""), (bytes, str)):
        del image.info["xmp"]


def _to_upright_rgb(image: Image.Image, turn: Turn | None) -> Image.Image:
    # of a WebP, the decoder and its buffers would live as long as the image
    if image.mode == "RGB" and turn is None and image.format != WEBP:
        return image
    is_gray_16 = image.mode in GRAY_16_BIT_MODES
    is_scaled = image.mode != "I" or _largest(image) > LARGEST_UINT8  # an "I" may also hold bytes
    is_share = holds_shares(image)
    upright = Image.new("RGB", image.size[::-1] if turn is not None and turn.swaps else image.size)
    for box in _boxes(image.size):
        block = image.crop(box)
        block.info = {}  # a transparent colour changes no pixel, but PIL fails to convert odd ones
        if is_gray_16:  # PIL would clip at 255, and the image be white
            block = _gray_block(block, is_scaled)
        if is_share:
            block = _share_block(block)
        if block.mode != "RGB":
            block = block.convert("RGB")
        upright.paste(
            block if turn is None else block.transpose(turn.method),
            box[:2] if turn is None else turn.place(box, image.size),
        )
    return upright


def _largest(image: Image.Image) -> int:
    """The largest value of an image of one channel."""
    _, largest = image.getextrema()
    assert isinstance(largest, int)
    return largest


def holds_shares(image: Image.Image) -> bool:
    """
    Tell whether a decoded image holds shares of white, floats from 0 to 1.

    Raises:
        ImageError: if it holds floats that are neither shares nor from 0 to 255.
    """
    if image.mode != FLOAT_MODE:
        return False
    extremes = []
    for box in _boxes(image.size):
        block = np.asarray(image.crop(box))
        extremes += [block.min(), block.max()]
    lowest, highest = np.min(extremes), np.max(extremes)  # not a number, if one of them is none
    if not (lowest >= 0 and highest <= LARGEST_UINT8):  # PIL would clip the values, or make any byte of no number
        raise ImageError(f"its floats are from {lowest:g} to {highest:g}; allowed: 0 to 1, or 0 to {LARGEST_UINT8}")
    return bool(highest <= 1)


def _share_block(block: Image.Image) -> Image.Image:
    """Bytes of floats from 0 to 1, rounded down as transformers does with arrays."""
    scaled = (np.asarray(block).astype(np.float64) * LARGEST_UINT8).astype(np.float32)
    return Image.fromarray(scaled.astype(np.uint8))


def _gray_block(block: Image.Image, is_scaled: bool) -> Image.Image:
    gray = np.asarray(block).astype(np.int32).clip(0, LARGEST_UINT16)
    if is_scaled:
        gray = gray * LARGEST_UINT8 // LARGEST_UINT16
    return Image.fromarray(gray.astype(np.uint8))


def _boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Blocks that cover an image of any proportions."""
    width, height = size
    columns = min(width, BLOCK_PIXELS)
    rows = max(BLOCK_PIXELS // columns, 1)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)
