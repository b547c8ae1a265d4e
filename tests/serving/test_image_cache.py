"""A conversation encodes the tiles of its image once, in whatever request the image comes again."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.helpers.serving import IMAGE_FILE, MODEL, data_uri, user

from fusion_hf.common.image_hosts import HostPolicy
from fusion_hf.inference import ChatModel, Conversation
from fusion_hf.inference.image_feature_cache import ENTRY_BYTES
from fusion_hf.serving.app import Service, build_app
from fusion_hf.serving.limits import Limits

QUESTIONS = ("what color is the shape?", "what shape is in the image?", "is there a blue shape?", "why?", "what else?")
TILES, MOST = 4, 8


@pytest.fixture
def tiles(chat_model: ChatModel) -> Iterator[list[int]]:
    """How many tiles each call of the tower encodes."""
    calls: list[int] = []
    handle = chat_model.model.model.vision_tower.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    yield calls
    handle.remove()


@asynccontextmanager
async def start(chat_model: ChatModel, **limits: int) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    """A server in this process, so that the calls of its tower can be counted; and its cache."""
    service = Service(chat_model, MODEL, Limits(**limits), HostPolicy.parse([], []), None, chat_model.token_budget())
    app = build_app(service)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            yield client, app.state.engine.chat_model.image_cache


async def ask(client: httpx.AsyncClient, messages: list[dict[str, Any]], **fields: Any) -> str:
    content = {"model": MODEL, "messages": messages, "max_tokens": MOST, **fields}
    reply = await client.post("/v1/chat/completions", json=content)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def as_file(image: Image.Image, kind: str) -> str:
    file = BytesIO()
    image.save(file, kind)
    return data_uri(file.getvalue(), kind.lower())


@pytest.mark.parametrize("bound", [{}, {"image_cache_bytes": 0}], ids=str)
def test_five_turns_encode_four_tiles_once(chat_model: ChatModel, tiles: list[int], bound: dict[str, int]):
    async def converse() -> list[str]:
        answers, messages = [], []
        async with start(chat_model, **bound) as (client, _):
            for turn, question in enumerate(QUESTIONS):
                messages.append(user(question, None if turn else data_uri(IMAGE_FILE.read_bytes())))
                answers.append(await ask(client, messages))
                messages.append({"role": "assistant", "content": answers[-1]})
        return answers

    answers = asyncio.run(converse())
    overviews = [1] * len(QUESTIONS)
    assert sorted(tiles) == (sorted([TILES] * len(QUESTIONS) + overviews) if bound else [*overviews, TILES])
    conversation = Conversation(chat_model, chat_model.open_image(str(IMAGE_FILE)), MOST)
    assert answers == [conversation.ask(question) for question in QUESTIONS]


def test_an_image_is_known_by_its_pixels(chat_model: ChatModel, tiles: list[int]):
    image = Image.open(IMAGE_FILE).convert("RGB")
    other = image.copy()
    other.paste("blue", (0, 0, *(side // 2 for side in image.size)))

    async def converse() -> None:
        async with start(chat_model) as (client, _):
            for each, kind in ((image, "PNG"), (image, "BMP"), (other, "PNG")):
                await ask(client, [user(QUESTIONS[0], as_file(each, kind))])
            await ask(client, [user(QUESTIONS[0], as_file(image, "PNG"))], query_len=4)

    asyncio.run(converse())
    assert tiles.count(TILES) == 3  # the image, the other one, and the image for another number of latent tokens


def test_clients_cannot_fill_the_memory(chat_model: ChatModel):
    bound = 8 * ENTRY_BYTES * 8

    async def flood() -> list[tuple[int, int]]:
        seen = []
        async with start(chat_model, image_cache_bytes=bound) as (client, cache):
            for shade in range(20):
                image = Image.new("RGB", (8, 8), (shade, 0, 0))
                await ask(client, [user("why?", as_file(image, "PNG"))], query_len=1, max_tokens=1)
                seen.append((len(cache), cache.nbytes))
        return seen

    seen = asyncio.run(flood())
    assert max(nbytes for _, nbytes in seen) <= bound
    assert 0 < max(count for count, _ in seen) < len(seen)
