"""A model, and requests about easy-vqa's images, without lmms-eval."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from fusion_hf.data.easy_vqa import read_easy_vqa
from fusion_hf.evaluation.prompting import Continuation, Generation, Messages, Request
from fusion_hf.inference import ChatModel

IMAGES = 12


@pytest.fixture(scope="session")
def chat_model() -> ChatModel:
    return ChatModel.load()


def conversation(question: str, *paths: Path) -> Messages:
    """As lmms-eval writes it."""
    images = [{"type": "image", "url": Image.open(path)} for path in paths]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    def make(question: str, *images: Path, number: int = 0, wanted: Generation | Continuation | None = None):
        wanted = Generation(max_new_tokens=6) if wanted is None else wanted
        return Request("easy_vqa", number, partial(conversation, question, *images), wanted)

    return make


@pytest.fixture(scope="session")
def questions(make_request) -> list[Request]:
    """All questions about some images, and each fourth one without its image."""
    pairs = [(text, image.path) for image in read_easy_vqa("test")[:IMAGES] for text, _ in image.questions]
    return [
        make_request(text, *([path] if number % 4 else []), number=number) for number, (text, path) in enumerate(pairs)
    ]
