"""The number of latent tokens of a batch that nobody else has drawn for."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from fusion_hf.model.image_opening_fusion import BROKEN_IMAGE

THUMBNAIL = (16, 16)  # enough to tell images apart, and cheap


class BatchDraw:
    """
    Draws a number of latent tokens for each batch from what is in it, so that it depends neither on the number of
    workers nor on the batches before it, which a resumed run does not read again.

    Batches with the same records get another number in another epoch. `epoch` says which one it is; without it, a
    `DataLoader`'s seed stands for it in a worker, and a batch that begins anew elsewhere.

    Args:
        query_lens: what is drawn from.
        seed: of the drawing.
    """

    def __init__(self, query_lens: Sequence[int], seed: int):
        self.query_lens, self.seed = tuple(query_lens), seed
        self.epoch: int | None = None
        self.first: str | None = None  # batch of this process
        self.rounds = 0  # how often it came again: an order that is not shuffled began anew

    def __call__(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> int:
        """Draw for the batch of these conversations, as `record_to_messages` gives them."""
        if len(self.query_lens) == 1:
            return self.query_lens[0]
        content = _digest(conversations)
        if self.epoch is not None:
            epoch = str(self.epoch)
        else:
            self.rounds += content == self.first
            self.first = self.first or content
            worker = get_worker_info()  # its seed is the epoch's and its number together
            epoch = f"{'' if worker is None else worker.seed - worker.id}/{self.rounds}"
        return random.Random(f"query_len/{self.seed}/{epoch}/{content}").choice(self.query_lens)


def _digest(conversations: Sequence[Sequence[dict[str, Any]]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for messages in conversations:
        for message in messages:
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for block in blocks or ():
                digest.update(_bytes_of(block.get("image") if block.get("type") == "image" else block.get("text")))
                digest.update(b"\0")
        digest.update(b"\1")
    return digest.hexdigest()


def _bytes_of(value: Any) -> bytes:
    """What tells a text or an image from another one."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        try:
            return value.resize(THUMBNAIL, Image.Resampling.NEAREST).tobytes()
        except BROKEN_IMAGE:  # which the processor is going to say
            return b""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return np.asarray(value).tobytes()
    return (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")
