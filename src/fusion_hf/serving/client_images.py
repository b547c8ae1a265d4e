"""Decode the image of a client from the bytes of a data URI. No value from a client names a file."""

import base64
import binascii
import re

from PIL import Image

from fusion_hf.common.errors import short_name
from fusion_hf.model.image_limits_fusion import ImageError
from fusion_hf.model.image_opening_fusion import open_image
from fusion_hf.model.image_processing_fusion import FusionImageProcessor
from fusion_hf.serving.api_errors import BAD_REQUEST, TOO_LARGE, ApiError
from fusion_hf.serving.limits import Limits

PARAM = "messages.content.image_url.url"
DATA_URI = re.compile(r"data:image/[\w.+-]{1,64};base64,", re.ASCII | re.IGNORECASE)
BASE64_CHARACTERS, BASE64_BYTES = 4, 3  # 4 characters encode 3 bytes


def is_data_uri(uri: str) -> bool:
    """
    Return whether a text claims to be a data URI.

    Args:
        uri: the text.
    """
    return uri[:5].lower() == "data:"


def decode_data_uri(uri: str, limits: Limits) -> bytes:
    """
    Decode the bytes of `data:image/...;base64,...`.

    Args:
        uri: the data URI.
        limits: the limits on requests.

    Raises:
        ApiError: if the text is not such a data URI, or has more than `limits.image_bytes`.
    """
    head = DATA_URI.match(uri)
    if head is None:
        allowed = "data:image/png;base64,... or the same with another type of image"
        raise ApiError(BAD_REQUEST, f"The data URI must be {allowed}, got {short_name(uri)!r}.", PARAM)
    if (len(uri) - head.end()) // BASE64_CHARACTERS * BASE64_BYTES > limits.image_bytes + BASE64_BYTES:
        raise too_large(limits)
    try:
        content = base64.b64decode(uri[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(BAD_REQUEST, f"The data URI is not valid base64: {error}.", PARAM) from error
    if len(content) > limits.image_bytes:
        raise too_large(limits)
    return content


def too_large(limits: Limits) -> ApiError:
    """
    Make the error of an image file with too many bytes.

    Args:
        limits: the limits on requests.
    """
    return ApiError(TOO_LARGE, f"The image file must have at most {limits.image_bytes} bytes.", PARAM)


def decode_client_image(content: bytes, processor: FusionImageProcessor, max_pixels: int) -> Image.Image:
    """
    Decode the image in the bytes of a file, upright and in RGB. Its size is checked before its pixels are decoded.

    Args:
        content: the bytes.
        processor: the image processor.
        max_pixels: the maximum number of pixels.

    Raises:
        ApiError: if the bytes are not an image, or the image is broken or has more than `max_pixels`.
        MemoryError: if there is not enough memory.
    """
    try:
        return open_image(content, max_pixels, exif_transpose=processor.exif_transpose)
    except ImageError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from error
        raise ApiError(BAD_REQUEST, f"The image cannot be used: {error.reason}.", PARAM) from error
