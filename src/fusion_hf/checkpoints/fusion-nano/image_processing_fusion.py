"""Image processor of FUSION: four tiles of a 2 x 2 enlargement, then the overview (the authors' `static_hd`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torch_tensor

from .compatibility_fusion import logger
from .configuration_fusion import NUM_TILES, TILES_PER_SIDE
from .image_limits_fusion import ImageError
from .image_opening_fusion import MAX_IMAGE_PIXELS, decode_image, holds_shares
from .image_sources_fusion import IMAGE_DIMENSIONS, describe_source, flatten_images, is_deferred, open_source

LARGEST_UINT8 = 255
RGB_CHANNELS = 3
CHANNELS = (RGB_CHANNELS, 4, 1)  # of an array; the most likely number comes first for ambiguous shapes
NUMBERS = "biuf"  # kinds of dtypes that hold pixels
NUMPY_FLOATS = ("torch.float16", "torch.float32", "torch.float64")


class FusionImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    exif_transpose (`bool`): Whether to turn the image upright by its EXIF orientation. The authors' code does not.
        Pass False to get the same pixels as theirs for rotated photos.
    max_image_pixels (`int`): Maximum number of pixels of an image, checked before decoding.
    as_bytes (`bool`, *optional*): Whether to return all pixels as bytes. Rescaling and normalization are then left to
        you.
    """

    exif_transpose: bool
    max_image_pixels: int
    as_bytes: bool | None


@dataclass(frozen=True)
class RGBImage:
    """An RGB image. `is_share` tells whether its values were floats from 0 to 1 instead of bytes."""

    image: Image.Image
    is_share: bool


class FusionImageProcessor(PilBackend):
    """
    Constructs a FUSION image processor, which converts images of any size to tiles.

    The image is resized with PIL's bicubic filter, without keeping the aspect ratio. It is resized to twice `size` and
    cut into four tiles in row-major order, and to `size` for the overview, which comes last. The values are then
    divided by 255 and normalized with `image_mean` and `image_std`. With `do_rescale=False, do_normalize=False`, they
    keep the range in which you passed them. Alpha is dropped. 16-bit gray values are scaled to 8 bits. The first frame
    of an animation is used.

    Images with floats from 0 to 1 are resized as bytes, as SigLIP's image processor does. With `do_rescale=False`,
    they stay floats from 0 to 1, and bytes stay bytes. Images are opened, decoded and cut one after another. Calls
    return `pixel_values` of shape `(num_images, 5, 3, height, width)`.

    Args:
        size (`dict[str, int]`, *optional*): Height and width of a tile in pixels. The default is 384 for both.
        resample (`PILImageResampling`, defaults to `PILImageResampling.BICUBIC`): Filter for resizing.
        do_rescale (`bool`, defaults to `True`): Whether to multiply the pixels by `rescale_factor`.
        rescale_factor (`float`, *optional*): Factor for the pixels. The default is 1 / 255.
        do_normalize (`bool`, defaults to `True`): Whether to normalize the pixels.
        image_mean, image_std (`float` or `list[float]`): Mean and standard deviation per channel.
        exif_transpose (`bool`, defaults to `True`): Whether to turn images upright by their EXIF orientation.
        max_image_pixels (`int`, defaults to 89478485): Maximum number of pixels of an image.
        as_bytes (`bool`, *optional*): Whether to return all pixels as bytes.

    Raises:
        ValueError: If an image cannot be read, has more than `max_image_pixels` pixels or would take too long to
            decode, or if an argument contradicts the tiles.

    Example:

    ```python
    >>> from PIL import Image
    >>> from fusion_hf import FusionImageProcessor, nano_path
    >>> image_processor = FusionImageProcessor.from_pretrained(nano_path())
    >>> inputs = image_processor(Image.new("RGB", (64, 48), "red"), return_tensors="pt")
    >>> tuple(inputs["pixel_values"].shape)
    (1, 5, 3, 48, 48)

    ```
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
    as_bytes = None

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Open images without decoding them. PIL images, arrays and tensors are returned unchanged.

        Args:
            image_url_or_urls: A source that `open_source` accepts (a path, URL, base64 string, bytes, ...), or a
                (nested) list of sources.

        Returns:
            The opened image, or a list of them.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if is_deferred(image_url_or_urls):  # it is opened when it is its turn
            return image_url_or_urls
        return open_source(image_url_or_urls)

    def process_image(self, image: Any, **kwargs: Any) -> Image.Image:
        """Convert one image, array or tensor to an RGB PIL image, the format in which it is resized."""
        return self._to_rgb(image, **kwargs).image

    def _to_rgb(
        self,
        image: Any,
        exif_transpose: bool = True,
        max_image_pixels: int = max_image_pixels,
        input_data_format: str | ChannelDimension | None = None,
        do_convert_rgb: bool | None = None,
        **kwargs: Any,
    ) -> RGBImage:
        is_share = False
        mode = image.mode if isinstance(image, Image.Image) else None
        if not isinstance(image, Image.Image):
            array = _as_array(image)
            is_share = _holds_shares(array)
            array = _channels_last(array, input_data_format)
            mode = "RGB" if array.shape[-1] == RGB_CHANNELS else f"{array.shape[-1]} channels"
            image = _to_image(array, is_share)
        if do_convert_rgb is False and mode != "RGB":
            raise ValueError(
                f"`do_convert_rgb` must be True for an image with mode {mode}, because the vision tower reads RGB, "
                "got False."
            )
        rgb = decode_image(image, max_image_pixels, exif_transpose)
        return RGBImage(rgb, is_share or holds_shares(image))

    def _preprocess_image_like_inputs(
        self, images: Any, *args: Any, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Open, decode and cut one image after another: all decoded images of a call could take gigabytes."""
        _check_settings(**kwargs)
        sources, size = flatten_images(images), kwargs["size"]
        pixel_values = np.empty((len(sources), NUM_TILES + 1, 3, size.height, size.width), dtype=np.uint8)
        are_shares = [
            self._write_tiles(source, tiles, **kwargs) for source, tiles in zip(sources, pixel_values, strict=True)
        ]
        tables = None if kwargs["as_bytes"] else _tables_of(are_shares, **kwargs)
        if tables is not None:
            pixel_values = _look_up(tables, pixel_values)
        # a whole array becomes a tensor without a copy, unlike a list of arrays
        data = {"pixel_values": list(pixel_values) if return_tensors is None else pixel_values}
        return BatchFeature(data, tensor_type=return_tensors)

    def _write_tiles(
        self, source: Any, out: np.ndarray, size: SizeDict, resample: PILImageResampling, **kwargs: Any
    ) -> bool:
        """Write the tiles of an image into `out` and return whether its values were floats from 0 to 1."""
        try:
            rgb = self._to_rgb(open_source(source), **kwargs)
        except ImageError as error:
            raise type(error)(error.reason, f"The image {describe_source(source)}") from error
        self.split_tiles(rgb.image, size, resample, out=out)
        return rgb.is_share

    @staticmethod
    def split_tiles(
        image: Image.Image, size: SizeDict, resample: PILImageResampling, out: np.ndarray | None = None
    ) -> np.ndarray:
        """
        Cut an RGB image into tiles.

        Args:
            image (`PIL.Image.Image`): RGB image.
            size (`SizeDict`): Height and width of a tile in pixels.
            resample (`PILImageResampling`): Filter for resizing.
            out (`np.ndarray` of shape `(5, 3, height, width)`, *optional*): Array for the result.

        Returns:
            `np.ndarray` of bytes, shape `(5, 3, height, width)`: Four tiles in row-major order, then the overview.
        """
        height, width = size.height, size.width
        tiles = np.empty((NUM_TILES + 1, 3, height, width), dtype=np.uint8) if out is None else out
        quarters = tiles[:NUM_TILES].reshape(TILES_PER_SIDE, TILES_PER_SIDE, 3, height, width)
        large = image.resize((TILES_PER_SIDE * width, TILES_PER_SIDE * height), resample)
        overview = image.resize((width, height), resample)
        # PIL splits the channels faster than NumPy transposes (height, width, 3)
        for channel, planes in enumerate(zip(large.split(), overview.split(), strict=True)):
            plane, tiles[NUM_TILES, channel] = map(np.asarray, planes)
            quarters[:, :, channel] = plane.reshape(TILES_PER_SIDE, height, TILES_PER_SIDE, width).swapaxes(1, 2)
        return tiles


def values_of_bytes(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
) -> np.ndarray:
    """
    Compute the value of each byte in each channel: 256 values are computed, and all pixels are looked up.

    Args:
        do_rescale, rescale_factor, do_normalize, image_mean, image_std: See [`FusionImageProcessor`].

    Returns:
        `np.ndarray` of float32, shape `(3, 256)`: The values.
    """
    table: np.ndarray = np.arange(LARGEST_UINT8 + 1, dtype=np.float64)[:, None].repeat(3, axis=1)
    table = table * rescale_factor if do_rescale else table
    table = (table - np.array(image_mean)) / np.array(image_std) if do_normalize else table
    return np.ascontiguousarray(table.T, dtype=np.float32)


def values_of_shares(
    do_normalize: bool, image_mean: float | Sequence[float], image_std: float | Sequence[float]
) -> np.ndarray:
    """
    Compute the value of each byte of an image that was given as floats from 0 to 1, without rescaling.

    The steps and their float32 precision are those of SigLIP's image processor, so the values match it exactly.

    Args:
        do_normalize, image_mean, image_std: See [`FusionImageProcessor`].

    Returns:
        `np.ndarray` of float32, shape `(3, 256)`: The values.
    """
    table = (np.arange(LARGEST_UINT8 + 1, dtype=np.float64) * (1 / LARGEST_UINT8)).astype(np.float32)
    table = table[:, None].repeat(RGB_CHANNELS, axis=1)  # (256, 3)
    if do_normalize:
        mean, std = (np.array(values, dtype=np.float32) for values in (image_mean, image_std))
        table = (table - mean) / std
    return np.ascontiguousarray(table.T)


def _tables_of(
    are_shares: Sequence[bool],
    do_rescale: bool | None,
    rescale_factor: float,
    do_normalize: bool | None,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
    **kwargs: Any,
) -> list[np.ndarray] | None:
    """Return the table `(3, 256)` of values for the bytes of each image, or None if all stay bytes."""
    if not (do_rescale or do_normalize or any(are_shares)):
        return None
    settings = (bool(do_normalize), image_mean, image_std)
    of_bytes = values_of_bytes(bool(do_rescale), rescale_factor, *settings)
    of_shares = of_bytes if do_rescale else values_of_shares(*settings)
    return [of_shares if is_share else of_bytes for is_share in are_shares]


def _check_settings(
    size: SizeDict,
    do_resize: bool | None,
    do_normalize: bool | None,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
    do_center_crop: bool | None,
    do_pad: bool | None,
    data_format: str | ChannelDimension | None,
    input_data_format: str | ChannelDimension | None,
    **kwargs: Any,
) -> None:
    """Raise a `ValueError` for arguments of an image processor that contradict the tiles."""
    if not do_resize:
        raise ValueError(f"`do_resize` must be True, because tiles are cut from a resized image, got {do_resize}.")
    if not size.height or not size.width:
        raise ValueError(f"`size` must have a height and a width, got {dict(size)}.")
    for name, value in (("do_center_crop", do_center_crop), ("do_pad", do_pad)):
        if value:
            raise ValueError(f"`{name}` must be False, because the tiles show the whole image, got {value}.")
    if data_format is not None and ChannelDimension(data_format) != ChannelDimension.FIRST:
        raise ValueError(f"`data_format` must be {ChannelDimension.FIRST.value!r}, got {data_format!r}.")
    if input_data_format is not None:
        ChannelDimension(input_data_format)  # raises an error that names the allowed values
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if do_normalize and np.shape(values) not in ((), (RGB_CHANNELS,)):
            allowed = f"a number, or one number for each of the {RGB_CHANNELS} channels"
            raise ValueError(f"`{name}` must be {allowed}, got {values}.")
    if do_normalize and np.min(image_std) <= 0:
        raise ValueError(f"`image_std` must be greater than 0, got {image_std}.")


def _look_up(tables: Sequence[np.ndarray], tiles: np.ndarray) -> np.ndarray:
    """Look up bytes `(n, 5, 3, height, width)` in the table `(3, 256)` of each image."""
    values = np.empty(tiles.shape, dtype=np.float32)
    for table, images, targets in zip(tables, tiles, values, strict=True):
        for tile, target in zip(images, targets, strict=True):
            for channel in range(len(table)):
                # one plane at a time, so that NumPy's indices stay in the cache; mode "clip" only skips the checks
                np.take(table[channel], tile[channel], out=target[channel], mode="clip")
    return values


def _as_array(image: Any) -> np.ndarray:
    """Return the pixels of an array or tensor on any device as an array `(H, W)`, `(H, W, C)` or `(C, H, W)`."""
    if is_torch_tensor(image):
        image = image.detach().cpu()
        is_unknown = image.dtype.is_floating_point and str(image.dtype) not in NUMPY_FLOATS
        image = (image.half() if is_unknown else image).numpy()  # exact for values from 0 to 255
    array = np.asarray(image)
    if array.ndim not in IMAGE_DIMENSIONS or array.size == 0:
        raise ValueError(f"An image must have pixels in two or three dimensions, got an array of shape {array.shape}.")
    if array.dtype.kind not in NUMBERS:
        raise ValueError(f"An image must be an array of booleans, integers or floats, got {array.dtype}.")
    lowest, highest = array.min(), array.max()
    if not (lowest >= 0 and highest <= LARGEST_UINT8):
        raise ValueError(
            f"An image must be an array of floats from 0 to 1 or of numbers from 0 to {LARGEST_UINT8}, got "
            f"{array.dtype} values from {lowest} to {highest}."
        )
    return array


def _holds_shares(array: np.ndarray) -> bool:
    """Return whether values are from 0 to 1. transformers treats floats without a fraction, and booleans, as bytes."""
    return array.dtype == bool or (array.dtype.kind == "f" and bool(array.max() <= 1))


def _channels_last(array: np.ndarray, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """Return the array of an image as `(H, W, C)`."""
    if array.ndim == min(IMAGE_DIMENSIONS):
        return array[..., None]
    first, last = array.shape[0], array.shape[-1]
    if input_data_format is not None:
        is_first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        channels = first if is_first else last
    else:
        channels = next((number for number in CHANNELS if number in (first, last)), last)
        is_first = channels == first
        if first in CHANNELS and last in CHANNELS:
            logger.warning_once(
                f"An image of shape {array.shape} may have its channels in the first or the last dimension. FUSION "
                f"uses the {'first' if is_first else 'last'}. Pass `input_data_format` to choose the dimension."
            )
    if channels not in CHANNELS:
        given = "" if input_data_format is None else f" with `input_data_format`={input_data_format!r}"
        raise ValueError(f"An image must have 1, 3 or 4 channels, first or last, got the shape {array.shape}{given}.")
    return np.moveaxis(array, 0, -1) if is_first else array


def _to_image(array: np.ndarray, is_share: bool) -> Image.Image:
    """Convert an array `(H, W, C)` to an image, without its alpha channel."""
    array = array[..., :RGB_CHANNELS] if array.shape[-1] > RGB_CHANNELS else array
    if array.dtype == bool:
        array = array.astype(np.float32)
    elif (
        is_share and array.dtype == np.float16
    ):  # rounding, since float16 may be below or above the byte's exact share
        array, is_share = np.rint(array.astype(np.float32) * LARGEST_UINT8).astype(np.uint8), False
    return to_pil_image(array, do_rescale=is_share or None, input_data_format=ChannelDimension.LAST)


FusionImageProcessor.register_for_auto_class()

__all__ = ["FusionImageProcessor"]
