"""Convert what lmms-eval asks to conversations, generation settings, and keys that identify prompts."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.sample_log import AskedQuestion
from fusion_hf.inference.image_digests import hash_image

MAX_NEW_TOKENS = 1024  # for tasks that do not set it
# lmms-eval stops at its few-shot delimiter if a task sets no stop text, but answers may have several paragraphs
NO_END = ("\n\n",)
USED = ("max_new_tokens", "until", "do_sample", "temperature", "top_p", "num_beams")
UNUSED = ("image_aspect_ratio", "use_cache", "interleaved_format")  # settings of other models
FORMAT = 1  # part of the keys: increase it when the same questions would get different answers

Messages: TypeAlias = list[dict[str, Any]]


class SeveralImages(InputError):
    """A request shows more than one image."""


@dataclass(frozen=True)
class Generation:
    """
    The settings of a generated answer.

    Attributes:
        max_new_tokens: the maximum number of tokens.
        until: the texts at which the answer ends.
        temperature: the sampling temperature. 0 selects the most likely answer.
        top_p: the probability mass of nucleus sampling.
        num_beams: the number of beams.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Generation":
        """
        Read the `generation_kwargs` of a task.

        Args:
            settings: the settings.

        Raises:
            InputError: if a setting is unknown.
        """
        unknown = sorted(set(settings) - {*USED, *UNUSED})
        if unknown:
            raise InputError(
                f"The keys of `generation_kwargs` must be among {', '.join((*USED, *UNUSED))}, got {unknown[0]!r}."
            )
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        temperature = float(settings.get("temperature") or 0)
        sampled = bool(settings.get("do_sample", temperature > 0))
        if sampled and temperature == 0:
            temperature = 1.0
        return cls(
            max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
            until=() if until == NO_END else until,
            temperature=temperature if sampled else 0.0,
            top_p=(settings.get("top_p") or None) if sampled else None,
            num_beams=int(settings.get("num_beams") or 1),
        )

    @property
    def sampled(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature > 0

    def cut(self, answer: str) -> str:
        """
        Cut an answer at the first of the texts in `until`.

        Args:
            answer: the answer.
        """
        ends = [end for end in (answer.find(text) for text in self.until if text) if end >= 0]
        return (answer[: min(ends)] if ends else answer).strip()

    def keywords(self) -> dict[str, Any]:
        """Return the arguments of `generate` other than the length."""
        if not self.sampled:
            return {"do_sample": False, "num_beams": self.num_beams}
        top_p = {} if self.top_p is None else {"top_p": self.top_p}
        return {"do_sample": True, "temperature": self.temperature, "num_beams": self.num_beams, **top_p}


@dataclass(frozen=True)
class Continuation:
    """A request for the probability of a given text."""

    text: str


@dataclass(frozen=True, eq=False)
class Request:
    """A request of lmms-eval. Images are opened only when `read` returns the conversation."""

    task: str
    doc_id: int
    read: Callable[[], Messages]
    wanted: Generation | Continuation
    repeat: int = 0  # number among equal requests whose answers are sampled


@dataclass(frozen=True, eq=False)
class EvaluationPrompt:
    """A prompt that is ready. `text` is what the model reads, and `length` an upper bound of its number of tokens."""

    request: Request
    messages: Messages
    text: str
    length: int
    image: Image.Image | None
    image_hash: str | None
    key: str

    @property
    def wanted(self) -> Generation | Continuation:
        """What the request asks for."""
        return self.request.wanted

    def describe(self) -> AskedQuestion:
        """Describe the prompt for the samples of a run."""
        messages = [
            {"role": message["role"], "content": [_without_image(block) for block in message["content"]]}
            for message in self.messages
        ]
        generation = asdict(self.wanted) if isinstance(self.wanted, Generation) else None
        return AskedQuestion(messages, self.text, self.image_hash, generation)


@dataclass(frozen=True)
class RequestReader:
    """
    Make prompts from requests.

    Args:
        identity: what all answers depend on.
        open_image: opens the image of an image block.
        render: converts a conversation to a text that identifies it, which is what the model reads if that is known.
        count: returns an upper bound of the number of tokens of that text.
    """

    identity: str
    open_image: Callable[[Any], Image.Image]
    render: Callable[[Messages], str]
    count: Callable[[str], int]

    def prompt(self, request: Request) -> EvaluationPrompt:
        """
        Make the prompt of a request.

        Args:
            request: the request.

        Raises:
            InputError: if the request cannot be answered.
        """
        messages, image = self._messages(request.read())
        text = self.render(messages)
        digest = None if image is None else hash_image(image)
        kind = type(request.wanted).__name__
        parts = [FORMAT, self.identity, kind, asdict(request.wanted), text, digest, request.repeat]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return EvaluationPrompt(request, messages, text, self.count(text), image, digest, key)

    def _messages(self, given: Messages) -> tuple[Messages, Image.Image | None]:
        """Return the conversation in the form that the processor takes, and its image."""
        messages, images = [], []
        for message in given:
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            own = []
            for block in blocks:
                if block["type"] == "image":
                    images.append(self.open_image(block["url"]))
                    own.append({"type": "image", "image": images[-1]})
                elif block["type"] == "text":
                    own.append({"type": "text", "text": block["text"]})
                else:
                    raise InputError(f"The type of a content block must be text or image, got {block['type']!r}.")
            messages.append({"role": message["role"], "content": own})
        if len(images) > 1:
            raise SeveralImages(f"A request must have at most one image, got {len(images)}.")
        return messages, images[0] if images else None


def _without_image(block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if block["type"] == "image" else block
