"""The page in a real Chromium, served by the real command. `make test-demo` runs it."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from fusion_hf.demo.demo_model import MAX_UPLOAD_BYTES
from fusion_hf.demo.examples import draw_examples
from fusion_hf.demo.guard import MAX_JSON_BYTES

pytestmark = pytest.mark.demo

SECONDS = 120
SCREENSHOTS = "FUSION_HF_SCREENSHOTS"  # environment variable: a folder
ANSWERS = ("red", "3", "left", "fish")  # to the examples


@pytest.fixture(scope="module")
def server(root: Path, free_port: int) -> Iterator[subprocess.Popen[str]]:
    """`fusion-hf demo`, listening."""
    command = [sys.executable, "-m", "fusion_hf", "demo", "--port", str(free_port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    assert f"http://127.0.0.1:{free_port}" in process.stdout.readline()
    yield process
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 0


@pytest.fixture(scope="module")
def address(server, free_port: int) -> str:
    return f"http://127.0.0.1:{free_port}"


@pytest.fixture
def visit(browser, address) -> Iterator[Callable]:
    """Opens the page as somebody who was never there."""
    from tests.demo.browsing import HEIGHT, WIDTH, Visitor

    contexts = []

    def visit(width: int = WIDTH, height: int = HEIGHT):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        return Visitor(contexts[-1].new_page(), address)

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("examples")
    files = [folder / f"{index}.png" for index in range(len(ANSWERS))]
    for file, example in zip(files, draw_examples(), strict=True):
        example.image.save(file)
    return files


def test_upload_ask_and_look(visit, red_circle, demo_model, session):
    visitor = visit()
    visitor.show(red_circle)
    assert visitor.ask("what color is the shape?") == "red"
    assert visitor.ask("what shape is in the image?") == "circle"
    assert visitor.answers() == ["red", "circle"]
    assert visitor.words() == ["circle"]
    overlay = visitor.look_at("circle")
    for question in ("what color is the shape?", "what shape is in the image?"):
        list(demo_model.ask(session, question, demo_model.budget.query_len))
    from fusion_hf.demo.views import draw_overlay

    expected = draw_overlay(session.image, demo_model.word_map(session, 1, 0))
    assert np.abs(overlay.astype(int) - np.asarray(expected)).max() <= 2
    times = visitor.page.locator("#times")
    assert not times.is_visible()
    visitor.unfold("numbers")
    times.wait_for()
    assert "preprocess" in times.inner_text() and times.inner_text().count(" ms") == 4
    assert visitor.image("overview").shape == visitor.image("tiles").shape


@pytest.mark.parametrize(("window", "size"), [("wide", (1280, 900)), ("narrow", (390, 844))])
def test_the_answer_is_beside_the_image(visit, example_files, window, size):
    """In a wide window and in a phone's, without scrolling. The variable of SCREENSHOTS keeps what is seen."""
    visitor = visit(*size)
    visitor.show(example_files[2])
    assert visitor.ask(draw_examples()[2].question) == ANSWERS[2]
    assert visitor.ask("what color is the circle?") == "black"
    visitor.look_at("black")
    visitor.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    image = visitor.page.locator("#image img").bounding_box()
    answer = visitor.page.locator("#chat .bot.message").last.bounding_box()
    assert image["x"] + image["width"] <= answer["x"]
    for box in (image, answer):
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0]
        assert box["y"] >= 0 and box["y"] + box["height"] <= size[1]
    if SCREENSHOTS in os.environ:
        visitor.page.screenshot(path=Path(os.environ[SCREENSHOTS], f"demo_{window}.png"))


def test_only_enlarged_images_have_sharp_pixels(visit, red_circle):
    visitor = visit()
    visitor.show(red_circle)
    rendering = "image => getComputedStyle(image).imageRendering"
    assert visitor.page.locator("#image img").evaluate(rendering) == "pixelated"
    assert visitor.page.locator("#tiles img").evaluate(rendering) == "auto"


def test_the_page_says_what_the_model_can_do(visit):
    text = visit().page.get_by_text("fusion-nano").locator("..").inner_text()
    assert "vision-language models" in text and "1.6 million parameters" in text and "cannot" in text


def test_what_another_model_can_do_is_not_known(demo_model, monkeypatch):
    from fusion_hf.demo.page import describe_model

    monkeypatch.setattr(demo_model.chat_model.model, "name_or_path", "runs/another")
    assert "fusion-nano" not in describe_model(demo_model)
    assert "2 million parameters" in describe_model(demo_model)


def test_the_words_of_an_earlier_answer(visit, red_circle):
    visitor = visit()
    visitor.show(red_circle)
    visitor.ask("what color is the shape?")
    visitor.ask("what shape is in the image?")
    latest = visitor.look_at("circle")
    visitor.page.get_by_label("Answer", exact=True).click()
    visitor.page.get_by_role("option", name="1: red").click()
    visitor.page.locator("#word label").get_by_text("red", exact=True).wait_for()
    assert visitor.words() == ["red"]
    assert not np.array_equal(visitor.look_at("red"), latest)


def test_examples(visit):
    visitor = visit()
    for index, example in enumerate(draw_examples()):
        visitor.page.get_by_text(example.question, exact=True).first.click()
        visitor.page.wait_for_function(
            "question => document.querySelector('textarea').value === question", arg=example.question
        )
        visitor.page.locator("#tiles img").wait_for()
        visitor.page.locator("#chat .bot.message").wait_for(state="detached")
        assert visitor.ask(example.question) == ANSWERS[index]


def test_visitors_do_not_mix(visit, example_files):
    visitors = [visit() for _ in example_files]
    for visitor, file in zip(visitors, example_files, strict=True):
        visitor.show(file)
    for visitor, example in zip(visitors, draw_examples(), strict=True):
        visitor.type(example.question)  # all wait at once
    for visitor, answer in zip(visitors, ANSWERS, strict=True):
        visitor.page.locator("#word label").first.wait_for()
        assert (visitor.answers(), visitor.words()) == ([answer], [answer])
    overlays = [visitor.look_at(answer).tobytes() for visitor, answer in zip(visitors, ANSWERS, strict=True)]
    assert len(set(overlays)) == len(overlays)


def test_another_number_of_latent_tokens(visit, red_circle):
    visitor = visit()
    visitor.show(red_circle)
    visitor.ask("what color is the shape?")
    many = visitor.look_at("red")
    visitor.page.locator("#reset").click()
    visitor.page.locator("#word label").first.wait_for(state="detached")
    visitor.unfold("numbers")
    visitor.choose_query_len(4)
    assert visitor.ask("what color is the shape?") == "red"
    assert not np.array_equal(visitor.look_at("red"), many)


def test_another_image_begins_anew(visit, example_files):
    visitor = visit()
    visitor.show(example_files[0])
    assert visitor.ask("what color is the shape?") == "red"
    visitor.show(example_files[3])
    visitor.page.locator("#chat .bot.message").wait_for(state="detached")
    assert visitor.ask("what word is written?") == "fish"


def test_a_port_that_is_taken(server, free_port, root):
    command = [sys.executable, "-m", "fusion_hf", "demo", "--port", str(free_port), "--device", "cpu"]
    result = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: The page cannot listen at 127.0.0.1, port {free_port}: ")
    assert result.stderr.count("\n") == 1


def test_no_host_but_this_one_is_asked(visit, red_circle, address):
    visitor = visit()
    visitor.show(red_circle)
    visitor.ask("what color is the shape?")
    local = (address, "data:", "blob:")
    assert [url for url in visitor.addresses if not url.startswith(local)] == []


def test_what_looks_like_html_is_text(visit, red_circle):
    visitor = visit()
    visitor.show(red_circle)
    question = (
        "<b>what</b> *color* <img src='http://127.0.0.1:9/x.png'> is the shape & \n ![](http://127.0.0.1:9/y.png)"
    )
    visitor.ask(question)
    shown = visitor.page.locator("#chat .user.message")
    assert shown.inner_text().split() == question.split()
    assert shown.locator("b, em, img").count() == 0


class TestRefusals:
    """Told in a note on the page, which goes on working."""

    def test_a_question_without_an_image(self, visit):
        visitor = visit()
        visitor.type("what color is the shape?")
        visitor.page.get_by_text("Show an image first.").wait_for()

    def test_no_image(self, visit, tmp_path, red_circle):
        file = tmp_path / "text.png"
        file.write_text("no image")
        visitor = visit()
        visitor.upload(file)
        visitor.page.get_by_text("it is none of").wait_for()
        visitor.show(red_circle)
        assert visitor.ask("what color is the shape?") == "red"

    def test_a_name_is_only_text(self, visit, tmp_path):
        file = tmp_path / "<b>x<b>.png"
        file.write_text("no image")
        visitor = visit()
        visitor.upload(file)
        note = visitor.page.get_by_test_id("toast-body")
        note.get_by_text("it is none of").wait_for()
        assert note.locator("b").count() == 0

    def test_the_conversation_is_too_long(self, visit, red_circle):
        visitor = visit()
        visitor.show(red_circle)
        visitor.type("why? " * 380)
        visitor.page.get_by_text("must have fewer tokens").wait_for()
        assert visitor.ask("what color is the shape?") == "red"


class TestHostileRequests:
    """Without a browser."""

    @staticmethod
    def post(address: str, path: str, body: bytes, kind: str = "application/json") -> int:
        request = Request(f"{address}/gradio_api/{path}", data=body, headers={"Content-Type": kind})
        try:
            with urlopen(request, timeout=SECONDS) as response:
                return response.status
        except HTTPError as error:
            return error.code

    def test_an_address_in_place_of_an_upload(self, address):
        call = {"data": [{"path": f"{address}/config"}], "fn_index": 0, "session_hash": "x"}
        assert self.post(address, "queue/join", json.dumps(call).encode()) == 422

    @pytest.mark.parametrize(
        ("path", "kind", "length"),
        [
            ("queue/join", "application/json", MAX_JSON_BYTES + 1),
            ("upload", "multipart/form-data; boundary=x", 2 * MAX_UPLOAD_BYTES),
        ],
    )
    def test_large_bodies_are_refused_before_they_are_sent(self, address, path, kind, length):
        connection = HTTPConnection(address.removeprefix("http://"), timeout=SECONDS)
        connection.putrequest("POST", f"/gradio_api/{path}")
        connection.putheader("Content-Type", kind)
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()

    @pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "src/fusion_hf/__init__.py"])
    def test_files_of_the_server(self, address, path):
        try:
            with urlopen(f"{address}/gradio_api/file={path}", timeout=SECONDS) as response:
                pytest.fail(f"got {response.read()[:40]!r}")
        except HTTPError as error:
            assert error.code in (403, 404)

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"meta": {"_type": "gradio.FileData"}},
            {"meta": {"_type": "gradio.FileData"}, "is_stream": True},
            {"is_stream": True, "url": "http://127.0.0.1"},
        ],
    )
    @pytest.mark.parametrize("is_relative", [False, True])
    def test_images_of_the_server(self, address, red_circle, root, fields, is_relative):
        """Which exist, and are images, but were not uploaded."""
        path = str(red_circle.relative_to(root) if is_relative else red_circle)
        assert self.tiles_of(address, {"path": path, **fields}) is None

    @pytest.mark.parametrize("path", [None, "", ".", "/", "nowhere.png", "\0"])
    def test_no_file(self, address, path):
        assert self.tiles_of(address, {"path": path}) is None

    def tiles_of(self, address: str, image: object) -> object:
        """What the page would show of the tiles of an image, as a browser names it; None: it refuses."""
        with urlopen(f"{address}/config", timeout=SECONDS) as response:
            calls = json.load(response)["dependencies"]
        look = next(call["id"] for call in calls if call["targets"] and call["targets"][0][1] == "change")
        session = secrets.token_hex(8)
        call = {"data": [image], "fn_index": look, "session_hash": session}
        assert self.post(address, "queue/join", json.dumps(call).encode()) == 200
        with urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=SECONDS) as events:
            lines = (json.loads(line.removeprefix(b"data: ")) for line in events if line.startswith(b"data: "))
            end = next(event for event in lines if event["msg"] == "process_completed")
        return end["output"]["data"][-1] if end["success"] else None

    def test_an_uploaded_image_for_comparison(self, address, red_circle):
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + red_circle.read_bytes() + b"\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        with urlopen(Request(f"{address}/gradio_api/upload", data=body, headers=kind), timeout=SECONDS) as response:
            (path,) = json.load(response)
        assert self.tiles_of(address, {"path": path, "meta": {"_type": "gradio.FileData"}}) is not None
