"""What lmms-eval asks, as this package's own: conversations, how to answer them, and what tells two of them apart."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.sample_log import AskedQuestion
from fusion_hf.inference.image_digests import hash_image

MAX_NEW_TOKENS = 1024  # where a task does not say
# lmms-eval puts its few-shot delimiter where a task names no end; an answer of two paragraphs must not be cut there
NO_END = ("\n\n",)
USED = ("max_new_tokens", "until", "do_sample", "temperature", "top_p", "num_beams")
UNUSED = ("image_aspect_ratio", "use_cache", "interleaved_format")  # of other models
FORMAT = 1  # another one means other answers to the same questions

Messages: TypeAlias = list[dict[str, Any]]


class SeveralImages(InputError):
    """A request shows more than one image."""


@dataclass(frozen=True)
class Generation:
    """An answer is wanted; `temperature` 0 means the most likely one. It ends before any of `until`."""

    max_new_tokens: int = MAX_NEW_TOKENS
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Generation":
        """
        Read a task's `generation_kwargs`.

        Raises:
            InputError: for a setting that is not known.
        """
        unknown = sorted(set(settings) - {*USED, *UNUSED})
        if unknown:
            raise InputError(f"generation_kwargs has {unknown[0]}; allowed: {', '.join((*USED, *UNUSED))}.")
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
        return self.temperature > 0

    def cut(self, answer: str) -> str:
        """Cut an answer to what counts."""
        ends = [end for end in (answer.find(text) for text in self.until if text) if end >= 0]
        return (answer[: min(ends)] if ends else answer).strip()

    def keywords(self) -> dict[str, Any]:
        """Return what `generate` takes beside the length."""
        if not self.sampled:
            return {"do_sample": False, "num_beams": self.num_beams}
        top_p = {} if self.top_p is None else {"top_p": self.top_p}
        return {"do_sample": True, "temperature": self.temperature, "num_beams": self.num_beams, **top_p}


@dataclass(frozen=True)
class Continuation:
    """The probability of a given answer is wanted."""

    text: str


@dataclass(frozen=True, eq=False)
class Request:
    """`read` gives the conversation as lmms-eval writes it, and opens images only then."""

    task: str
    doc_id: int
    read: Callable[[], Messages]
    wanted: Generation | Continuation
    repeat: int = 0  # counts equal requests whose answers are sampled


@dataclass(frozen=True, eq=False)
class EvaluationPrompt:
    """A request that is ready: `text` is what the model reads, `length` at least the number of its tokens."""

    request: Request
    messages: Messages
    text: str
    length: int
    image: Image.Image | None
    image_hash: str | None
    key: str

    @property
    def wanted(self) -> Generation | Continuation:
        return self.request.wanted

    def describe(self) -> AskedQuestion:
        """For a run's samples."""
        messages = [
            {"role": message["role"], "content": [_without_image(block) for block in message["content"]]}
            for message in self.messages
        ]
        generation = asdict(self.wanted) if isinstance(self.wanted, Generation) else None
        return AskedQuestion(messages, self.text, self.image_hash, generation)


@dataclass(frozen=True)
class RequestReader:
    """
    Makes prompts.

    Args:
        identity: what all answers depend on.
        open_image: makes an image of what a message shows.
        render: a conversation as text that tells it apart from others; what the model reads, if that is known.
        count: at least the number of that text's tokens.
    """

    identity: str
    open_image: Callable[[Any], Image.Image]
    render: Callable[[Messages], str]
    count: Callable[[str], int]

    def prompt(self, request: Request) -> EvaluationPrompt:
        """
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
        """The conversation as the processor takes it, and its image."""
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
                    raise InputError(f"A message shows {block['type']}; allowed: text and image.")
            messages.append({"role": message["role"], "content": own})
        if len(images) > 1:
            raise SeveralImages(f"The request shows {len(images)} images; FUSION reads 1.")
        return messages, images[0] if images else None


def _without_image(block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if block["type"] == "image" else block
