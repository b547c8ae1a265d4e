"""Opening the image of a record: under its root only, bounded before it is decoded, whole or not at all."""

import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile

from fusion_hf.common.errors import short_name
from fusion_hf.data.record_parsing import FileSpan, ImageReference, OnTruncated, RecordProblem
from fusion_hf.model.image_limits_fusion import ImageError, OversizedImage
from fusion_hf.model.image_opening_fusion import open_image

PIL_SETTINGS = threading.RLock()
MAX_IMAGE_BYTES = 2**28  # of an encoded image inside a file: it is read before its size in pixels is known


def open_record_image(
    image: ImageReference,
    root: Path,
    max_pixels: int,
    exif_transpose: bool = True,
    on_truncated: OnTruncated = "error",
) -> Image.Image:
    """
    Decode the image as far as the image processor would: what it gives breaks nothing any more.

    Args:
        image: a path is relative to `root`.
        root: a resolved folder, which no path may leave, not by a link either.
        max_pixels: more are refused before they are decoded.
        exif_transpose: turn the image upright by its EXIF orientation.
        on_truncated: `load` takes what there is of an image that ends too early, the rest is grey or black.

    Returns:
        The image in mode RGB.

    Raises:
        RecordProblem: if it is missing, outside of `root`, too large, truncated or no image.
    """
    if isinstance(image, str):
        source: Path | bytes = record_image_path(image, root)
    else:
        source = image if isinstance(image, bytes) else _read(image)
    try:
        with limits_of_pil(max_pixels, on_truncated):
            return open_image(source, max_pixels, exif_transpose=exif_transpose)
    except OversizedImage as error:
        raise RecordProblem("oversized image", error.reason) from error
    except ImageError as error:
        raise RecordProblem("broken image", error.reason) from error


@contextmanager
def limits_of_pil(max_pixels: int, on_truncated: OnTruncated) -> Iterator[None]:
    """Let PIL open as many pixels, and as little of a file, as is allowed: it has one setting for a whole process."""
    with PIL_SETTINGS:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        if before[0] is not None:
            Image.MAX_IMAGE_PIXELS = max(max_pixels, before[0])
        ImageFile.LOAD_TRUNCATED_IMAGES = on_truncated == "load"
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def record_image_path(name: str, root: Path) -> Path:
    """
    Resolve the path of an existing file under `root`, which is resolved itself.

    Raises:
        RecordProblem: if there is none.
    """
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise RecordProblem("path escape", f"{short_name(name)!r} is not under {root}; allowed: paths under it")
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError, RuntimeError) as error:  # of too long names, null characters and circular links
        raise RecordProblem("missing image", f"there is no {short_name(name)!r} under {root}") from error
    if not is_file:
        raise RecordProblem("missing image", f"{short_name(name)!r} under {root} is no file")
    return path


def _read(span: FileSpan) -> bytes:
    if span.size > MAX_IMAGE_BYTES:
        raise RecordProblem("oversized image", f"it has {span.size} bytes; allowed: {MAX_IMAGE_BYTES}")
    with span.file.open("rb", buffering=0) as stream:
        stream.seek(span.offset)
        return stream.read(span.size)
