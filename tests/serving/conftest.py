"""A server for all tests, with a stand-in for a host that has images, and the same model without a server."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.helpers.serving import ImageHost, Server, run_server

from fusion_hf.inference import ChatModel, nano_path


@pytest.fixture(scope="session")
def chat_model() -> ChatModel:
    return ChatModel.load(device="cpu")


@pytest.fixture(scope="session")
def image_host() -> Iterator[ImageHost]:
    with ImageHost() as host:
        yield host


@pytest.fixture(scope="session")
def server(image_host: ImageHost) -> Iterator[Server]:
    """May fetch images from the stand-in, and from hosts by these names if their addresses are public."""
    names = ("127.0.0.1", "[::1]", "169.254.169.254", "10.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1")
    public = [word for name in names for word in ("--allow-image-host", name)]
    with run_server("--allow-private-image-host", f"127.0.0.1:{image_host.port}", *public) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fusion-nano that never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("endless") / "fusion-nano"
    shutil.copytree(nano_path(), folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["suppress_tokens"] += config["eos_token_id"]
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def talkative(endless_model: Path) -> Iterator[openai.OpenAI]:
    """A client of that model, which says something long where tokens are drawn."""
    with run_server("--model", endless_model) as running:
        yield running.client()
