"""Open the image of a record safely: only from allowed places, and with limits that apply before decoding."""

import asyncio
import base64
import binascii
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile

from fusion_hf.common.errors import short_name
from fusion_hf.common.extras import require
from fusion_hf.common.image_hosts import HostPolicy, ImageRefused, check_url
from fusion_hf.common.user_values import is_address
from fusion_hf.data.image_places import NO_PLACES, ImagePlaces
from fusion_hf.data.record_parsing import FileSpan, ImageReference, OnTruncated, RecordProblem
from fusion_hf.model.image_limits_fusion import ImageError, OversizedImage
from fusion_hf.model.image_opening_fusion import open_image

PIL_SETTINGS = threading.RLock()
MAX_IMAGE_BYTES = 2**28  # limit of an encoded image inside a file, which is read before its size in pixels is known
MAX_FETCHED_BYTES = 10 * 2**20  # limit of a downloaded image, equal to the server's default
DATA_URI, BASE64 = "data:", ";base64"


def open_record_image(
    image: ImageReference,
    root: Path,
    max_pixels: int,
    exif_transpose: bool = True,
    on_truncated: OnTruncated = "error",
    places: ImagePlaces = NO_PLACES,
) -> Image.Image:
    """
    Decode the image of a record and apply the checks of the image processor, so that the result can be used without
    further errors.

    Args:
        image: a path relative to `root`, a data URI, encoded bytes, bytes in a larger file, or an http(s) address.
        root: a resolved folder. No path or symbolic link may lead out of it, except into the folders of `places`.
        max_pixels: the maximum number of pixels. Larger images are rejected before they are decoded.
        exif_transpose: whether to rotate the image by its EXIF orientation.
        on_truncated: `load` uses what can be decoded of a truncated image and leaves the rest grey or black. `error`
            rejects it.
        places: where else images may be.

    Returns:
        The image in mode RGB.

    Raises:
        RecordProblem: if the image is missing, at a place that is not allowed, too large, truncated or invalid.
    """
    source = find_record_image(image, root, places)
    if isinstance(source, FileSpan):
        source = _read(source)
    elif isinstance(source, str):
        source = _fetch(source, places.hosts)
    try:
        with limits_of_pil(max_pixels, on_truncated):
            return open_image(source, max_pixels, exif_transpose=exif_transpose)
    except OversizedImage as error:
        raise RecordProblem("oversized image", error.reason) from error
    except ImageError as error:
        raise RecordProblem("broken image", error.reason) from error


@contextmanager
def limits_of_pil(max_pixels: int, on_truncated: OnTruncated) -> Iterator[None]:
    """
    Apply the limits to PIL while the context is active. PIL has one setting for the whole process.

    Args:
        max_pixels: the maximum number of pixels of an image.
        on_truncated: whether truncated images are loaded.
    """
    with PIL_SETTINGS:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        if before[0] is not None:
            Image.MAX_IMAGE_PIXELS = max(max_pixels, before[0])
        ImageFile.LOAD_TRUNCATED_IMAGES = on_truncated == "load"
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def find_record_image(image: ImageReference, root: Path, places: ImagePlaces = NO_PLACES) -> Path | ImageReference:
    """
    Find the source of a record's image. Nothing is downloaded yet.

    Args:
        image: the reference in the record.
        root: the folder of relative paths.
        places: where else images may be.

    Returns:
        The resolved path of an existing file, or the bytes of a data URI. Other references are returned unchanged.

    Raises:
        RecordProblem: if the file does not exist or is at a place that is not allowed.
    """
    if not isinstance(image, str):
        return image
    if image[: len(DATA_URI)].lower() == DATA_URI:
        return _decode_data_uri(image)
    if not is_address(image):
        return _record_image_path(image, root, places.folders)
    try:
        check_url(image, places.hosts)
    except ImageRefused as error:
        raise RecordProblem("remote image", f"{error}; the host must be listed in `image_hosts`") from error
    return image


def _record_image_path(name: str, root: Path, folders: tuple[Path, ...]) -> Path:
    try:
        path = (root / name).resolve()
        if not any(path.is_relative_to(folder) for folder in (root, *folders)):
            allowed = "or under a folder of `image_roots`"
            raise RecordProblem("path escape", f"the path must lie under {root} {allowed}, got {short_name(name)!r}")
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError, RuntimeError) as error:  # names that are too long, null characters and circular links
        raise RecordProblem("missing image", f"there is no {short_name(name)!r} under {root}") from error
    if not is_file:
        raise RecordProblem("missing image", f"{short_name(name)!r} under {root} is not a file")
    return path


def _decode_data_uri(uri: str) -> bytes:
    head, _, content = uri.partition(",")
    if not head.lower().endswith(BASE64):
        raise RecordProblem("broken image", f"{short_name(uri)!r} is not a data URI in base64")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordProblem("broken image", f"{short_name(uri)!r} is not valid base64 ({error})") from error


def _fetch(url: str, hosts: HostPolicy) -> bytes:
    """Download an image in a separate thread, since notebooks already run an event loop in this one."""
    require(("httpcore",), "An image at an address", "train")
    from fusion_hf.common.image_fetching import fetch

    with ThreadPoolExecutor(1) as executor:
        try:
            return executor.submit(asyncio.run, fetch(url, hosts, MAX_FETCHED_BYTES)).result()
        except ImageRefused as error:
            raise RecordProblem("remote image", str(error)) from error


def _read(span: FileSpan) -> bytes:
    if span.size > MAX_IMAGE_BYTES:
        raise RecordProblem("oversized image", f"the image must have at most {MAX_IMAGE_BYTES} bytes, got {span.size}")
    with span.file.open("rb", buffering=0) as stream:
        stream.seek(span.offset)
        return stream.read(span.size)
