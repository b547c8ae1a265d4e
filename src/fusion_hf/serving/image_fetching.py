"""Download the image of a client, with the rules of `common/image_fetching.py` and errors of the API."""

from fusion_hf.common.errors import short_name
from fusion_hf.common.image_fetching import ImageTooLarge, fetch
from fusion_hf.common.image_hosts import HostPolicy, ImageRefused
from fusion_hf.serving.api_errors import BAD_REQUEST, ApiError
from fusion_hf.serving.client_images import PARAM, too_large
from fusion_hf.serving.limits import Limits


async def fetch_image(url: str, policy: HostPolicy, limits: Limits) -> bytes:
    """
    Download the content of an http or https address.

    Args:
        url: the address.
        policy: the hosts that are allowed.
        limits: the limits on requests.

    Raises:
        ApiError: if the address is not allowed, or returns no content within the limits.
    """
    try:
        return await fetch(url, policy, limits.image_bytes)
    except ImageTooLarge as error:
        raise too_large(limits) from error
    except ImageRefused as error:
        message = f"The image {short_name(error.url)!r} cannot be downloaded: {error.reason}."
        raise ApiError(BAD_REQUEST, message, PARAM, "image_not_allowed") from error
