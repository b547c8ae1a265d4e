"""An answer that nobody waits for ends, so that the next visitor gets his. With a page in this process."""

import json
import time
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from fusion_hf.demo.demo_model import DemoModel

pytestmark = pytest.mark.demo

QUESTION = "what color is the shape?"
PAUSE = 0.05  # seconds per token
LONGEST = 400  # tokens, which take much longer than a test waits
PATIENCE = 5  # seconds


@pytest.fixture
def slow(chat_model, monkeypatch) -> Iterator[list[int]]:
    """Makes the model slow and its answers endless; counts its tokens."""
    specials = chat_model.processor.tokenizer.all_special_ids
    monkeypatch.setattr(chat_model.model.generation_config, "suppress_tokens", specials)
    tokens: list[int] = []
    handle = chat_model.model.lm_head.register_forward_hook(lambda *_: tokens.append(1) or time.sleep(PAUSE))
    yield tokens
    handle.remove()


@pytest.fixture
def address(chat_model, free_port: int, tmp_path, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    from fusion_hf.demo.page import build_page, launch_settings

    page = build_page(DemoModel(chat_model, LONGEST))
    _, address, _ = page.launch(server_port=free_port, quiet=True, prevent_thread_lock=True, **launch_settings())
    yield address
    page.close(verbose=False)


def wait_until_it_stands_still(tokens: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = len(tokens)
        time.sleep(10 * PAUSE)
        if len(tokens) == before:
            return
    pytest.fail(f"the model goes on: {len(tokens)} tokens")


def test_the_stop_button(browser, address, slow, red_circle, monkeypatch, chat_model):
    from tests.demo.browsing import Visitor

    visitor = Visitor(browser.new_page(), address)
    visitor.show(red_circle)
    visitor.type(QUESTION)
    while not slow:
        time.sleep(PAUSE)
    visitor.page.locator("button.stop-button").click()
    wait_until_it_stands_still(slow)
    assert len(slow) < LONGEST
    visitor.page.locator("#chat .bot.message").wait_for(state="detached")
    assert visitor.answers() == []
    monkeypatch.setattr(chat_model.model.generation_config, "suppress_tokens", None)
    assert visitor.ask(QUESTION) == "red"
    visitor.page.close()


def test_a_closed_tab(browser, address, slow, red_circle):
    from tests.demo.browsing import Visitor

    visitor = Visitor(browser.new_page(), address)
    visitor.show(red_circle)
    visitor.type(QUESTION)
    while not slow:
        time.sleep(PAUSE)
    visitor.page.close()
    wait_until_it_stands_still(slow)
    assert len(slow) < LONGEST


def test_the_queue_is_bounded(browser, address, slow, red_circle):
    from tests.demo.browsing import Visitor

    from fusion_hf.demo.page import MAX_WAITING

    visitor = Visitor(browser.new_page(), address)
    visitor.show(red_circle)
    visitor.type(QUESTION)
    while not slow:
        time.sleep(PAUSE)
    call = json.dumps({"data": [None], "fn_index": visitor.call_of("change"), "session_hash": "waits"}).encode()
    request = Request(f"{address}gradio_api/queue/join", data=call, headers={"Content-Type": "application/json"})
    for _ in range(MAX_WAITING):
        urlopen(request, timeout=PATIENCE).close()
    with pytest.raises(HTTPError, match="503"):
        urlopen(request, timeout=PATIENCE)
    visitor.page.close()
    wait_until_it_stands_still(slow)
