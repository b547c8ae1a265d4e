"""A client's image: the bytes of a data URI, and the image in them; nothing of a client names a file."""

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
BASE64_CHARACTERS, BASE64_BYTES = 4, 3  # so many characters are so many bytes


def is_data_uri(uri: str) -> bool:
    """Return whether it says that it is one."""
    return uri[:5].lower() == "data:"


def decode_data_uri(uri: str, limits: Limits) -> bytes:
    """
    Decode the bytes in `data:image/...;base64,...`.

    Raises:
        ApiError: if it is none, or has more than `limits.image_bytes`.
    """
    head = DATA_URI.match(uri)
    if head is None:
        allowed = "data:image/png;base64,... or of another kind of image"
        raise ApiError(BAD_REQUEST, f"The data URI begins with {short_name(uri)!r}; allowed: {allowed}.", PARAM)
    if (len(uri) - head.end()) // BASE64_CHARACTERS * BASE64_BYTES > limits.image_bytes + BASE64_BYTES:
        raise too_large(limits)
    try:
        content = base64.b64decode(uri[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(BAD_REQUEST, f"The data URI is no base64: {error}.", PARAM) from error
    if len(content) > limits.image_bytes:
        raise too_large(limits)
    return content


def too_large(limits: Limits) -> ApiError:
    """Return the error of an image's file with too many bytes."""
    return ApiError(TOO_LARGE, f"The image is too large; allowed: {limits.image_bytes} bytes.", PARAM)


def decode_client_image(content: bytes, processor: FusionImageProcessor, max_pixels: int) -> Image.Image:
    """
    Decode the image in a file's bytes, upright, in RGB. Its size is checked before its pixels are decoded.

    Raises:
        ApiError: if it is none, is broken or has more than `max_pixels`.
        MemoryError: if there is too little memory for it.
    """
    try:
        return open_image(content, max_pixels, exif_transpose=processor.exif_transpose)
    except ImageError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from error
        raise ApiError(BAD_REQUEST, f"The image cannot be used: {error.reason}.", PARAM) from error
