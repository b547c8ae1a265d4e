"""What a server lets its clients have. Imports nothing heavy: the command line shows these defaults."""

from dataclasses import dataclass

from fusion_hf.inference.image_feature_cache import IMAGE_CACHE_BYTES

MEGABYTE = 2**20
MAX_IMAGES = 1  # FUSION reads one image


@dataclass(frozen=True)
class Limits:
    """
    image_bytes: of an image's file.
    image_pixels: of an image; checked before it is decoded.
    image_seconds: of a processor's time for decoding an image.
    body_bytes: of a request.
    upload_bytes: of all requests that are still arriving, together; never less than `body_bytes`.
    prompt_tokens: text, image and latent tokens together; never more than the model's maximum.
    answer_tokens: of an answer, and how long one is that the client does not limit.
    image_cache_bytes: of images' features that are kept for further questions; 0: none is.
    parallel: requests that are answered at the same time.
    queue_length: requests that wait beside them; more are sent away.
    seconds: from the end of a request's head to the end of its answer.
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
