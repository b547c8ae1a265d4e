"""Digests of images' pixels, by which an image that was shown before is known again; no client finds two alike."""

import hashlib

import numpy as np
from PIL import Image

from fusion_hf.model.image_opening_fusion import UPRIGHT, read_orientation


def digest_pixels(pixels: np.ndarray) -> str:
    """Digest an image's values with their type and shape."""
    digest = hashlib.sha256(f"{pixels.dtype.str} {pixels.shape} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def hash_image(image: Image.Image) -> str:
    """Hash an image's pixels, whatever file they came from, and how it is to be turned."""
    orientation = read_orientation(image)
    turned = "" if orientation == UPRIGHT else f" {orientation}"
    return hashlib.sha256(f"{image.mode} {image.size}{turned}".encode() + image.tobytes()).hexdigest()
