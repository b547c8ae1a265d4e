"""A model, and requests about easy-vqa's pictures, without lmms-eval."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from fusion_hf.data.easy_vqa import read_easy_vqa
from fusion_hf.evaluation.prompting import Continuation, Generation, Messages, Request
from fusion_hf.inference import ChatModel

PICTURES = 12


@pytest.fixture(scope="session")
def chat_model() -> ChatModel:
    return ChatModel.load()


def conversation(question: str, *pictures: Path) -> Messages:
    """As lmms-eval writes it."""
    images = [{"type": "image", "url": Image.open(picture)} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    def make(question: str, *pictures: Path, number: int = 0, wanted: Generation | Continuation | None = None):
        wanted = Generation(max_new_tokens=6) if wanted is None else wanted
        return Request("easy_vqa", number, partial(conversation, question, *pictures), wanted)

    return make


@pytest.fixture(scope="session")
def questions(make_request) -> list[Request]:
    """All questions about some pictures, and each fourth one without its picture."""
    pairs = [(text, picture.path) for picture in read_easy_vqa("test")[:PICTURES] for text, _ in picture.questions]
    return [
        make_request(text, *([path] if number % 4 else []), number=number) for number, (text, path) in enumerate(pairs)
    ]
