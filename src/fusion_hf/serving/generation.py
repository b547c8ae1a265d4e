"""One answer during generation: its pieces of text, its end, and the drawing of its tokens."""

from collections.abc import Callable

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from fusion_hf.serving.chat_requests import Sampling

# smallest temperature: below it, float32 rounds the probability of other tokens to 0, and the division may overflow
LEAST_TEMPERATURE = 1e-30
HALF_CHARACTER = "\ufffd"  # how a tokenizer decodes the bytes of an incomplete character


class AnswerText(BaseStreamer):
    """
    Convert tokens to text as they are generated. The concatenated pieces equal the result of `ChatModel.decode`, up
    to a stop text.

    Args:
        tokenizer: the tokenizer of the model.
        stops: texts before which the answer ends.
        emit: a function that is called with each further piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], emit: Callable[[str], None]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.emit = emit
        self.is_stopped = False
        self._prompt_is_due = True
        self._ids: list[int] = []
        self._begin = self._read = (
            0  # index of the first id that can influence the spelling of the next word, and the number of decoded ids
        )
        self._text = ""
        self._searched = self._sent = 0

    def put(self, value: torch.Tensor) -> None:
        """
        Add tokens. `generate` calls this with the prompt `(1, S)`, and then with each new token `(1,)`.

        Args:
            value: the tokens.
        """
        if self._prompt_is_due:
            self._prompt_is_due = False
            return
        self._ids.extend(value.tolist())
        before, text = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
        if len(text) > len(before) and not text.endswith(HALF_CHARACTER):
            self._begin, self._read = self._read, len(self._ids)
            self._append(text[len(before) :])

    def end(self) -> None:
        """Send the rest of the text. `generate` calls this after the last token."""
        if self.is_stopped:
            return
        whole = self._decode(self._ids)
        if whole.startswith(self._text):
            self._append(whole[len(self._text) :])
        self._send(self._text)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _append(self, text: str) -> None:
        self._text += text
        ends = [end for stop in self.stops if (end := self._text.find(stop, self._searched)) >= 0]
        if ends:
            self.is_stopped = True
            self._send(self._text[: min(ends)])
        else:
            kept = self._may_become_stop()
            self._searched = len(self._text) - kept
            self._send(self._text[: self._searched])

    def _may_become_stop(self) -> int:
        """Return the number of characters at the end that may be the beginning of a stop text."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if self._text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _send(self, text: str) -> None:
        """Send the new part of `text`. White space at its end is held back, since it may be the end of the answer."""
        text = text.strip()
        if len(text) > self._sent:
            self.emit(text[self._sent :])
            self._sent = len(text)


class SamplingLogitsProcessor(LogitsProcessor):
    """
    Draw a token and forbid all others, so that `generate` without sampling selects it.

    Each answer has its own random numbers on the CPU, so that a seed gives the same answer whatever else is being
    answered.

    Args:
        sampling: the settings of the draw.
    """

    def __init__(self, sampling: Sampling):
        self.temperature = max(sampling.temperature, LEAST_TEMPERATURE)
        self.warper = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1.0 else None
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float().cpu() / self.temperature  # (1, V)
        if self.warper is not None:
            logits = self.warper(input_ids, logits)
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=self.generator)  # (1, 1)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen.to(scores.device), 0.0)
