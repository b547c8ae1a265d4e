"""What an answer on the page costs, and a streamer that takes the time and can be stopped."""

from dataclasses import dataclass
from threading import Event
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer


class StoppedError(Exception):
    """Nobody waits for this answer any more."""


@dataclass(frozen=True)
class ImageTimes:
    """Seconds that an image takes once: cutting it into tiles, and encoding the four that no question guides."""

    preprocessing: float
    encoding: float


@dataclass(frozen=True)
class AnswerTimes:
    """Seconds until an answer's first token, its number of tokens, and seconds from the first to the last of them."""

    first_token: float
    tokens: int
    decoding: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens behind the first; None if there are none."""
        return (self.tokens - 1) / self.decoding if self.decoding > 0 else None


class AnswerStream(TextIteratorStreamer):
    """Yields an answer's text piece by piece; begins to count when it is made."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._begin = perf_counter()
        self._moments: list[float] = []
        self.ids: list[int] = []  # of the answer
        self._is_stopped = Event()

    def put(self, value: torch.Tensor) -> None:
        """
        Called by `generate` with the prompt, then with each token.

        Raises:
            StoppedError: after `stop`; it ends `generate`.
        """
        if self._is_stopped.is_set():
            raise StoppedError
        if not self.next_tokens_are_prompt:
            self._moments.append(perf_counter())
            self.ids += value.tolist()
        super().put(value)

    def stop(self) -> None:
        """End `generate` with its next token."""
        self._is_stopped.set()

    def close(self, _: Any = None) -> None:
        """End the iteration, also if `generate` has failed."""
        self.text_queue.put(self.stop_signal)

    def times(self) -> AnswerTimes:
        """Of an answer that is complete."""
        first, last = self._moments[0], self._moments[-1]
        return AnswerTimes(first - self._begin, len(self._moments), last - first)


def now() -> float:
    """Return the clock in seconds, when everything that an accelerator was told to do is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter()
