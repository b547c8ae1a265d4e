"""A client's image at an address, by the rules of `common/image_fetching.py`; errors are those of the API."""

from fusion_hf.common.errors import short_name
from fusion_hf.common.image_fetching import ImageTooLarge, fetch
from fusion_hf.common.image_hosts import HostPolicy, ImageRefused
from fusion_hf.serving.api_errors import BAD_REQUEST, ApiError
from fusion_hf.serving.client_images import PARAM, too_large
from fusion_hf.serving.limits import Limits


async def fetch_image(url: str, policy: HostPolicy, limits: Limits) -> bytes:
    """
    Fetch the content at an http(s) address.

    Raises:
        ApiError: if the address is not allowed, or gives no content within the limits.
    """
    try:
        return await fetch(url, policy, limits.image_bytes)
    except ImageTooLarge as error:
        raise too_large(limits) from error
    except ImageRefused as error:
        message = f"The image {short_name(error.url)!r}: {error.reason}."
        raise ApiError(BAD_REQUEST, message, PARAM, "image_not_allowed") from error
