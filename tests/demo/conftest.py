"""fusion-nano behind the page, and a browser before it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import http_server

from fusion_hf.demo.demo_model import DemoModel, Session
from fusion_hf.inference import ChatModel

ROOT = Path(__file__).parents[2]
MOST = 16
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def red_circle(root: Path) -> Path:
    return root / "docs" / "assets" / "red_circle.png"


@pytest.fixture(scope="session")
def chat_model() -> ChatModel:
    return ChatModel.load(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def demo_model(chat_model: ChatModel) -> DemoModel:
    return DemoModel(chat_model, MOST)


@pytest.fixture
def session(demo_model: DemoModel, red_circle: Path) -> Session:
    return demo_model.open_session(red_circle)


@pytest.fixture(scope="session")
def free_port() -> int:
    return http_server.free_port()


@pytest.fixture(scope="module")  # while it is open, no other test can use asyncio
def browser() -> Iterator[Any]:
    """The Chromium of this machine; or playwright's own, which fails with advice where it is not installed either."""
    from playwright.sync_api import sync_playwright

    installed = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed)
        yield browser
        browser.close()
