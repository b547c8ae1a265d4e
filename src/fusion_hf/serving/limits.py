"""What a server lets its clients have. Imports nothing heavy: the command line shows these defaults."""

from dataclasses import dataclass

from fusion_hf.inference.image_feature_cache import IMAGE_CACHE_BYTES

MEGABYTE = 2**20
MAX_IMAGES = 1  # FUSION reads one image


@dataclass(frozen=True)
class Limits:
    """
    What requests may cost.

    Args:
        image_bytes: Largest image file, in bytes.
        image_pixels: Largest image, in pixels. It is checked before the image is decoded.
        image_seconds: Processor time for decoding an image, in seconds.
        body_bytes: Largest request, in bytes.
        upload_bytes: All requests that are still arriving, together, in bytes. Never less than `body_bytes`.
        prompt_tokens: Longest prompt: text, image and latent tokens. Never more than the model's maximum.
        answer_tokens: Longest answer, and the default of a request without `max_tokens`.
        image_cache_bytes: Image features that are kept for further questions, in bytes. 0 keeps none.
        parallel: Requests that are answered at the same time. Further ones wait.
        queue_length: Requests that wait. Further ones are refused.
        seconds: Time from the end of a request's head to the end of its answer.
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
