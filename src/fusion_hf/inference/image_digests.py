"""Digests of the pixels of images, which identify images. Clients cannot construct two images with equal digests."""

import hashlib

import numpy as np
from PIL import Image

from fusion_hf.model.image_opening_fusion import UPRIGHT, read_orientation


def digest_pixels(pixels: np.ndarray) -> str:
    """Return the digest of an image's values, type and shape."""
    digest = hashlib.sha256(f"{pixels.dtype.str} {pixels.shape} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def hash_image(image: Image.Image) -> str:
    """Return the digest of an image's pixels and its orientation, whatever file they came from."""
    orientation = read_orientation(image)
    turned = "" if orientation == UPRIGHT else f" {orientation}"
    return hashlib.sha256(f"{image.mode} {image.size}{turned}".encode() + image.tobytes()).hexdigest()
