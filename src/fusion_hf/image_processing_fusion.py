"""Pictures to five tiles: four quarters of a 2 x 2 enlargement, then the overview (FUSION's `static_hd`)."""

import base64
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .configuration_fusion import NUM_TILES, TILES_PER_SIDE
from .image_limits_fusion import ImageError
from .image_opening_fusion import MAX_IMAGE_PIXELS, decode_image, identify_image, read_file

LARGEST_UINT8 = 255
MAX_DOWNLOAD_BYTES = 2**28  # of a picture at an address: who serves it may never stop sending


class FusionImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    exif_transpose (`bool`): turn the picture upright by its EXIF orientation. The authors' code does not: pass False
        for pixels equal to theirs on such photos.
    max_image_pixels (`int`): pictures with more pixels are refused before they are decoded.
    """

    exif_transpose: bool
    max_image_pixels: int


class FusionImageProcessor(PilBackend):
    """
    Makes `pixel_values` of shape `(num_images, 5, 3, height, width)` from pictures of any size.

    The picture is resized with PIL's bicubic filter, aspect ratio ignored, to twice `size` and cut into four tiles in
    row-major order, and to `size` for the overview, which comes last. Then `/ 255`, minus `image_mean`, divided by
    `image_std`; without both (`do_rescale=False, do_normalize=False`) pixels stay bytes. Alpha is dropped, 16-bit grey
    is scaled to 8 bits, the first frame of an animation is taken.

    Raises:
        ValueError: for an image that cannot be read, has more than `max_image_pixels` pixels, or would decode slowly.
    """

    valid_kwargs = FusionImageProcessorKwargs
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    exif_transpose = True
    max_image_pixels = MAX_IMAGE_PIXELS

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths, URLs, base64 text and data URIs (or lists of them) without decoding; others pass through."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return _open(os.fspath(image_url_or_urls))
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self,
        image: Any,
        exif_transpose: bool = True,
        max_image_pixels: int = max_image_pixels,
        input_data_format: Any = None,
        **kwargs: Any,
    ) -> Image.Image:
        """One picture (PIL, array or tensor) as RGB PIL image: resizing needs PIL's, so nothing is converted twice."""
        if not isinstance(image, Image.Image):
            array = _drop_alpha(np.asarray(image))
            if array.size == 0:
                raise ValueError(f"An image must have pixels, got an array of shape {array.shape}.")
            if array.dtype == bool:
                array = array.astype(np.uint8) * LARGEST_UINT8
            # transformers takes floats without a fraction for bytes, and black and white for two shades of black
            is_share = array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1
            image = to_pil_image(array, do_rescale=is_share or None, input_data_format=input_data_format)
        return decode_image(image, max_image_pixels, exif_transpose)

    def _preprocess(
        self,
        images: list[Image.Image],
        size: SizeDict,
        resample: PILImageResampling,
        do_resize: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        if not do_resize:
            raise ValueError("do_resize is False; allowed: True. The tiles are cut from a resized picture.")
        pixel_values = np.empty((len(images), NUM_TILES + 1, 3, size.height, size.width), dtype=np.uint8)
        for image, tiles in zip(images, pixel_values, strict=True):
            self.cut(image, size, resample, out=tiles)
        if do_rescale or do_normalize:  # else bytes stay bytes, as in transformers
            table = values_of_bytes(do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            pixel_values = _look_up(table, pixel_values)
        # a whole array becomes a tensor as it is, a list of arrays would be copied
        data = {"pixel_values": list(pixel_values) if return_tensors is None else pixel_values}
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def cut(
        image: Image.Image, size: SizeDict, resample: PILImageResampling, out: np.ndarray | None = None
    ) -> np.ndarray:
        """
        An RGB picture as bytes `(5, 3, height, width)`: four tiles in row-major order, then the overview. They are
        written into `out`, if it is given.
        """
        height, width = size.height, size.width
        tiles = np.empty((NUM_TILES + 1, 3, height, width), dtype=np.uint8) if out is None else out
        quarters = tiles[:NUM_TILES].reshape(TILES_PER_SIDE, TILES_PER_SIDE, 3, height, width)
        large = image.resize((TILES_PER_SIDE * width, TILES_PER_SIDE * height), resample)
        overview = image.resize((width, height), resample)
        # PIL parts the channels faster than NumPy turns (height, width, 3) around
        for channel, planes in enumerate(zip(large.split(), overview.split(), strict=True)):
            plane, tiles[NUM_TILES, channel] = map(np.asarray, planes)
            quarters[:, :, channel] = plane.reshape(TILES_PER_SIDE, height, TILES_PER_SIDE, width).swapaxes(1, 2)
        return tiles


def values_of_bytes(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> np.ndarray:
    """What each byte becomes in each channel, float32 `(3, 256)`: 256 values to compute, all pixels to look up."""
    table: np.ndarray = np.arange(LARGEST_UINT8 + 1, dtype=np.float64)[:, None].repeat(3, axis=1)
    table = table * rescale_factor if do_rescale else table
    table = (table - np.array(image_mean)) / np.array(image_std) if do_normalize else table
    return np.ascontiguousarray(table.T, dtype=np.float32)


def _look_up(table: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """The values of `table` `(3, 256)` for bytes `(n, 5, 3, height, width)`."""
    values = np.empty(tiles.shape, dtype=table.dtype)
    for tile, target in zip(tiles.reshape(-1, *tiles.shape[2:]), values.reshape(-1, *tiles.shape[2:]), strict=True):
        for channel in range(len(table)):
            # plane by plane, so that NumPy's indices stay in the cache; "clip" only says that none is to be checked
            np.take(table[channel], tile[channel], out=target[channel], mode="clip")
    return values


def _open(source: str) -> Image.Image:
    """An image from a path, an http(s) URL, base64 text or a data URI; not yet decoded."""
    name = source if len(source) <= 100 else f"{source[:100]}..."
    try:
        return identify_image(_read(source))
    except ImageError as error:
        raise ValueError(f"The image {name!r} cannot be opened: {error.reason}.") from error
    except (OSError, HTTPError) as error:
        raise ValueError(f"The image {name!r} cannot be opened: {error}.") from error
    except (ValueError, IndexError) as error:  # of base64, and of a data URI without a comma
        raise ValueError(f"No image: {name!r} is neither a file, an http(s) URL, a data URI nor base64.") from error


def _read(source: str) -> bytes:
    if source.startswith(("http://", "https://")):
        return _download(source)
    if not source.startswith("data:") and os.path.isfile(source):  # noqa: PTH113 (a Path raises on long base64)
        return read_file(source)
    content = source.split(",", 1)[1] if source.startswith("data:") else source
    return base64.b64decode("".join(content.split()), validate=True)


def _download(url: str) -> bytes:
    """What is at an http(s) address, up to MAX_DOWNLOAD_BYTES."""
    try:
        is_address = url.isprintable() and urlsplit(url).port != 0
    except ValueError:  # of its host or port
        is_address = False
    if not is_address:
        raise OSError("this is no address")
    content = bytearray()
    with get_session().stream("GET", url, follow_redirects=True) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > MAX_DOWNLOAD_BYTES:
                raise OSError(f"it has more than the allowed {MAX_DOWNLOAD_BYTES} bytes")
    return bytes(content)


def _drop_alpha(array: np.ndarray) -> np.ndarray:
    """Three of four channels, whether they come first or last."""
    if array.ndim == 3 and array.shape[-1] == 4:
        return array[..., :3]
    return array[:3] if array.ndim == 3 and array.shape[0] == 4 else array


FusionImageProcessor.register_for_auto_class()

__all__ = ["FusionImageProcessor"]
