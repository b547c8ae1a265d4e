"""Safe opening of untrusted images: one way to read, decode and convert them, and one set of errors."""

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

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # none of their readers starts a program
MAX_IMAGE_PIXELS = 89_478_485  # PIL warns above this number
MAX_SIDE = 2**20  # PIL keeps a pointer for each row, which takes more memory than a narrow row itself
MAX_FILE_BYTES = 2**30  # more than any image with MAX_IMAGE_PIXELS takes, compressed or not
# Errors that PIL raises when it opens, decodes or converts files that are broken or malicious.
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
BLOCK_PIXELS = 2**16  # number of pixels that are converted at a time
LONGEST_REASON = 200  # characters
ORIENTATION_TAG, UPRIGHT = 0x0112, 1  # EXIF
TIFF = "TIFF"
FORMATS_WITH_PARTS = ("JPEG", "JPEG2000", "MPO", "PPM", TIFF)  # the formats that `check_parts` examines


class Turn(NamedTuple):
    """How to turn an image upright, and where its first column and row are afterwards."""

    method: Image.Transpose
    mirrors_columns: bool
    mirrors_rows: bool
    swaps: bool = False

    def place(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int]:
        """
        Return the position of a part of an image in the upright image.

        Args:
            box (`tuple[int, int, int, int]`): Left, top, right and bottom of the part in the original image.
            size (`tuple[int, int]`): Width and height of the original image.

        Returns:
            `tuple[int, int]`: Left and top of the part in the upright image.
        """
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
        source (`bytes`, `str` or `os.PathLike`): Content of an image file, or its path.
        max_pixels (`int`): Maximum number of pixels, checked before decoding.
        max_bytes (`int`): Maximum size of the file in bytes.
        formats (`Sequence[str]`): Accepted formats, by PIL's names.
        exif_transpose (`bool`): Whether to turn the image upright by its EXIF orientation.

    Returns:
        `PIL.Image.Image`: The decoded image in mode RGB.

    Raises:
        ImageError: If the file cannot be read or does not hold a usable image.
    """
    return decode_image(identify_image(read_file(source, max_bytes), formats, max_bytes), max_pixels, exif_transpose)


def read_file(source: bytes | str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """
    Read an image file into memory. PIL behaves differently when it opens a path.

    Args:
        source (`bytes`, `str` or `os.PathLike`): Content of an image file, which is returned, or its path.
        max_bytes (`int`): Maximum size of the file in bytes.

    Returns:
        `bytes`: The content of the file.

    Raises:
        ImageError: If the file cannot be read or has more than `max_bytes` bytes.
    """
    if isinstance(source, bytes):
        return source
    try:
        with Path(source).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(max_bytes + 1) if size <= max_bytes else b""
    except (OSError, ValueError) as error:  # ValueError: the name contains a null character
        raise ImageError(f"it cannot be read: {_shown(error)}") from error
    _check_size(max(size, len(content)), max_bytes)
    return content


def identify_image(
    content: bytes, formats: Sequence[str] = FORMATS, max_bytes: int = MAX_FILE_BYTES
) -> ImageFile.ImageFile:
    """
    Open an image without decoding it. Use [`decode_image`] to decode it.

    Args:
        content (`bytes`): Content of an image file.
        formats (`Sequence[str]`): Accepted formats, by PIL's names.
        max_bytes (`int`): Maximum size of the file in bytes.

    Returns:
        `PIL.ImageFile.ImageFile`: The image, which is not decoded yet.

    Raises:
        ImageError: If the image has none of the `formats`, or has too many bytes or parts.
    """
    _check_size(len(content), max_bytes)
    check_parts(content)
    with _reported():
        try:
            return Image.open(BoundedStream(content), formats=tuple(formats))
        except UnidentifiedImageError as error:
            raise ImageError(f"it cannot be decoded: it is none of {', '.join(formats)}, or is truncated") from error


def decode_image(image: Image.Image, max_pixels: int = MAX_IMAGE_PIXELS, exif_transpose: bool = True) -> Image.Image:
    """
    Decode a PIL image, turn it upright, and convert it to RGB.

    Alpha is dropped. 16-bit gray values and floats from 0 to 1 are scaled to 8 bits. The first frame of an animation
    is used. An upright RGB image is returned itself. Other images are converted in blocks, so that the conversion
    takes no memory besides both images.

    Args:
        image (`PIL.Image.Image`): Image, decoded or not.
        max_pixels (`int`): Maximum number of pixels, checked before decoding.
        exif_transpose (`bool`): Whether to turn the image upright by its EXIF orientation. PIL always turns TIFFs.

    Returns:
        `PIL.Image.Image`: The upright image in mode RGB.

    Raises:
        ImageError: If the image is broken, is too expensive to decode, or has floats outside 0 to 255.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise OversizedImage(
            f"it has {width} x {height} = {width * height} pixels, more than max_image_pixels = {max_pixels}"
        )
    if max(width, height) > MAX_SIDE:
        raise OversizedImage(f"it has {width} x {height} pixels, more than {MAX_SIDE} in a row or column")
    load_image(image)
    orientation = read_orientation(image) if exif_transpose else UPRIGHT
    with _reported():
        return _to_upright_rgb(image, TURNS.get(orientation))


def read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation of an image (1 to 8). Return 1, upright, if it cannot be read."""
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
        raise OversizedImage(f"it has {size} bytes, more than the limit of {max_bytes}")


@contextmanager
def _reported() -> Iterator[None]:
    """Convert the errors that PIL raises to an [`ImageError`]."""
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
    """Return PIL's message in one line without a full stop, or the type of an error without a message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the file name, which the caller knows
    text = " ".join(str(error).split()).rstrip(".")[:LONGEST_REASON] or type(error).__name__
    # other errors come from inside PIL, and their messages say nothing about the file
    return text if isinstance(error, SPEAKING) else f"its structure is broken ({text})"


def load_image(image: Image.Image) -> None:
    """
    Decode the pixels of a PIL image in place.

    Args:
        image (`PIL.Image.Image`): Image, decoded or not.

    Raises:
        ImageError: If the image is broken or too expensive to decode.
    """
    with _reported():
        # a copy (by `copy.deepcopy` or from another process) holds decoded pixels and has no file
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
    if isinstance(image.info.get("transparency"), str):  # a text chunk of that name, which PIL would use as a colour
        del image.info["transparency"]
    image.load()
    if is_ours:
        image.fp = None  # the decoder of a WebP holds a second copy of the pixels


def _check_file(image: ImageFile.ImageFile) -> int:
    """Check the file of an image that the caller opened. Return its size, or 0 if it is decoded and closed."""
    try:
        position = image.fp.tell() if image.fp is not None else 0
    except ValueError:  # the file is closed
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
    """Keep only the orientation of a TIFF, which PIL applies while decoding: PIL fails on other unusual tags."""
    try:
        exif = image.getexif()
    except BROKEN_IMAGE:
        exif = image.getexif()  # now it holds what could be read
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
    # the decoder of a WebP and its buffers would live as long as the image
    if image.mode == "RGB" and turn is None and image.format != WEBP:
        return image
    is_gray_16 = image.mode in GRAY_16_BIT_MODES
    is_scaled = image.mode != "I" or _largest(image) > LARGEST_UINT8  # mode "I" may also hold bytes
    is_share = holds_shares(image)
    upright = Image.new("RGB", image.size[::-1] if turn is not None and turn.swaps else image.size)
    for box in _boxes(image.size):
        block = image.crop(box)
        block.info = {}  # a transparent colour changes no pixel, but PIL fails to convert unusual ones
        if is_gray_16:  # PIL would clip at 255, and the image would be white
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
    """Return the largest value of an image with one channel."""
    _, largest = image.getextrema()
    assert isinstance(largest, int)
    return largest


def holds_shares(image: Image.Image) -> bool:
    """
    Return whether a decoded image holds floats from 0 to 1.

    Args:
        image (`PIL.Image.Image`): Decoded image.

    Raises:
        ImageError: If the image holds floats outside 0 to 255.
    """
    if image.mode != FLOAT_MODE:
        return False
    extremes = []
    for box in _boxes(image.size):
        block = np.asarray(image.crop(box))
        extremes += [block.min(), block.max()]
    lowest, highest = np.min(extremes), np.max(extremes)  # NaN if any value is NaN
    if not (lowest >= 0 and highest <= LARGEST_UINT8):  # PIL would clip these values, and convert NaN to any byte
        raise ImageError(
            f"its floats range from {lowest:g} to {highest:g}, but must be from 0 to 1 or from 0 to {LARGEST_UINT8}"
        )
    return bool(highest <= 1)


def _share_block(block: Image.Image) -> Image.Image:
    """Convert floats from 0 to 1 to bytes, rounded down as transformers does for arrays."""
    scaled = (np.asarray(block).astype(np.float64) * LARGEST_UINT8).astype(np.float32)
    return Image.fromarray(scaled.astype(np.uint8))


def _gray_block(block: Image.Image, is_scaled: bool) -> Image.Image:
    gray = np.asarray(block).astype(np.int32).clip(0, LARGEST_UINT16)
    if is_scaled:
        gray = gray * LARGEST_UINT8 // LARGEST_UINT16
    return Image.fromarray(gray.astype(np.uint8))


def _boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield blocks that cover an image of any proportions."""
    width, height = size
    columns = min(width, BLOCK_PIXELS)
    rows = max(BLOCK_PIXELS // columns, 1)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)
