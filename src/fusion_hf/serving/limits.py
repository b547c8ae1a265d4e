"""The limits on requests. This module imports nothing heavy, since the command line shows the defaults."""

from dataclasses import dataclass

from fusion_hf.inference.image_feature_cache import IMAGE_CACHE_BYTES

MEGABYTE = 2**20
MAX_IMAGES = 1  # FUSION reads one image


@dataclass(frozen=True)
class Limits:
    """
    The limits on requests to the server.

    Attributes:
        image_bytes: The maximum size of an image file in bytes.
        image_pixels: The maximum number of pixels of an image, which is checked before decoding.
        image_seconds: The maximum processor time for decoding an image in seconds.
        body_bytes: The maximum size of the body of a request in bytes.
        upload_bytes: The maximum size of all arriving bodies together in bytes, at least `body_bytes`.
        prompt_tokens: The maximum number of text, image and latent tokens of a prompt, at most the maximum of the
            model.
        answer_tokens: The maximum number of tokens of an answer, and the default of requests that set none.
        image_cache_bytes: The maximum size of the cache for image features in bytes. 0 disables the cache.
        parallel: The maximum number of requests that are answered concurrently.
        queue_length: The maximum number of waiting requests. Further requests are rejected.
        seconds: The maximum time from the end of the request's headers to the end of the answer in seconds.
    """

    image_bytes: int = 10 * MEGABYTE
    image_pixels: int = 2**25
    image_seconds: float = 5
    body_bytes: int = 16 * MEGABYTE
    upload_bytes: int = 256 * MEGABYTE
    prompt_tokens: int = 4096
    answer_tokens: int = 1024
    image_cache_bytes: int = IMAGE_CACHE_BYTES
    parallel: int = 4
    queue_length: int = 64
    seconds: int = 300
