"""Draw the number of latent tokens of a batch from its content."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from fusion_hf.model.image_opening_fusion import BROKEN_IMAGE

THUMBNAIL = (16, 16)  # large enough to distinguish images, and cheap


class BatchDraw:
    """
    Draw a number of latent tokens for each batch from the content of the batch.

    The number depends neither on the number of workers nor on earlier batches, which a resumed run does not read
    again. Equal batches get different numbers in different epochs. Set `epoch` to choose the epoch. Without it, the
    seed of a `DataLoader` identifies the epoch in a worker, and elsewhere the return of the first batch starts a new
    one.

    Args:
        query_lens: the numbers to draw from.
        seed: the seed of the draw.
    """

    def __init__(self, query_lens: Sequence[int], seed: int):
        self.query_lens, self.seed = tuple(query_lens), seed
        self.epoch: int | None = None
        self.first: str | None = None  # digest of the first batch of this process
        self.rounds = 0  # how often it was seen again, which starts another round of an unshuffled order

    def __call__(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> int:
        """
        Draw the number for a batch.

        Args:
            conversations: the messages of each record, as `record_to_messages` returns them.

        Returns:
            One of `query_lens`.
        """
        if len(self.query_lens) == 1:
            return self.query_lens[0]
        content = _digest(conversations)
        if self.epoch is not None:
            epoch = str(self.epoch)
        else:
            self.rounds += content == self.first
            self.first = self.first or content
            worker = get_worker_info()  # its seed is the sum of the epoch's seed and the worker's number
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
    """Return bytes that distinguish a text or an image from others."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        try:
            return value.resize(THUMBNAIL, Image.Resampling.NEAREST).tobytes()
        except BROKEN_IMAGE:  # the processor will report it
            return b""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return np.asarray(value).tobytes()
    return (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")
