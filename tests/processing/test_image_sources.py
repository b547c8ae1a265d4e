"""Where images come from: every place reads every kind of source, in bounded time, memory and files."""

import base64
import io
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from tests.helpers.chat_models import load_chat_model, write_chat_model
from tests.helpers.http_server import HttpServer, Request, Response, serve_connections
from tests.helpers.image_files import encoded, png_claiming
from tests.helpers.waiting import wait_until
from transformers import pipeline

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.common.errors import InputError
from fusion_hf.inference import ChatModel
from fusion_hf.inference.batching import batch_generate
from fusion_hf.model import image_sources_fusion
from fusion_hf.model.image_limits_fusion import ImageError, OversizedImage
from fusion_hf.model.image_sources_fusion import MAX_DOWNLOAD_SECONDS
from fusion_hf.training.collator import FusionDataCollator

PHOTO = Image.fromarray(skimage.data.astronaut()[:300])
CONTENT = encoded(PHOTO, "PNG")
QUESTION = "what color is the shape?"
ANSWER = {"role": "assistant", "content": "red"}


def at_its_end() -> io.BytesIO:
    stream = io.BytesIO()
    PHOTO.save(stream, "PNG")
    return stream


class Pipe(io.RawIOBase):
    """A stream that cannot seek, as of a process."""

    def __init__(self, content: bytes):
        self.inner = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.inner.readinto(buffer)


def temporary() -> Any:
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    file.write(CONTENT)
    return file


# by kind: what is given, of the path of a file
SOURCES: dict[str, Callable[[str], Any]] = {
    "path": lambda path: path,
    "pathlib": Path,
    "base64": lambda path: base64.b64encode(CONTENT).decode(),
    "data URI": lambda path: f"data:image/png;base64,{base64.b64encode(CONTENT).decode()}",
    "bytes": lambda path: CONTENT,
    "bytearray": lambda path: bytearray(CONTENT),
    "memoryview": lambda path: memoryview(CONTENT),
    "BytesIO": lambda path: io.BytesIO(CONTENT),
    "BytesIO at its end": lambda path: at_its_end(),
    "open file": lambda path: open(path, "rb"),  # noqa: PTH123, SIM115
    "pipe": lambda path: io.BufferedReader(Pipe(CONTENT)),
    "temporary file": lambda path: temporary(),
    "datasets, bytes and path": lambda path: {"bytes": CONTENT, "path": "name-in-an-archive.png"},
    "datasets, bytes": lambda path: {"bytes": CONTENT, "path": None},
    "datasets, bytes alone": lambda path: {"bytes": CONTENT},
    "datasets, path": lambda path: {"bytes": None, "path": path},
    "datasets, path alone": lambda path: {"path": path},
    "PIL": lambda path: PHOTO,
    "array": lambda path: np.asarray(PHOTO),
    "tensor": lambda path: torch.from_numpy(np.asarray(PHOTO).copy()),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("images") / "photo.png"
    file.write_bytes(CONTENT)
    return str(file)


@pytest.fixture(scope="module", params=["nano", "phi3"])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    """fusion-nano, and a tiny model whose placeholders lie behind the vocabulary."""
    if request.param == "nano":
        folder = Path(nano_path())
    else:
        folder = write_chat_model(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return load_chat_model(folder)


def chat(block: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [block, {"type": "text", "text": QUESTION}]}]


def encode(processor: FusionProcessor, messages: list[dict[str, Any]]) -> dict[str, Any]:
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(messages, **settings)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_place_reads_every_source(
    loaded: tuple[FusionForConditionalGeneration, FusionProcessor], path: str, kind: str
) -> None:
    model, processor = loaded
    images = processor.image_processor
    expected = images(PHOTO, return_tensors="pt")["pixel_values"]

    def give() -> Any:
        return SOURCES[kind](path)

    assert torch.equal(images(give(), return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(
        images([[give()], give()], return_tensors="pt")["pixel_values"], expected.expand(2, -1, -1, -1, -1)
    )
    assert torch.equal(images(images.fetch_images(give()), return_tensors="pt")["pixel_values"], expected)
    text = "<image><latent_image>a"
    assert torch.equal(processor(images=give(), text=text, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor(images=[[give()]], text=[text], return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor(images=give(), return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(encode(processor, chat({"type": "image", "image": give()}))["pixel_values"], expected)
    for compact in (False, True):
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
        records = [
            {"messages": [{"role": "user", "content": QUESTION}, ANSWER], "image": give()},
            {"conversations": turns, "images": [give()]},
            {"messages": [*chat({"type": "image", "image": give()}), ANSWER]},
        ]
        collator = FusionDataCollator(processor, compact=compact)
        batch = collator.unpack(collator(records))
        assert torch.equal(batch["pixel_values"], expected.expand(3, -1, -1, -1, -1))
    chat_model = ChatModel(model, processor)
    assert chat_model.open_image(give()).tobytes() == PHOTO.tobytes()
    answer = chat_model.answer(chat({"type": "image", "image": PHOTO}), max_new_tokens=4)
    assert chat_model.answer(chat({"type": "image", "image": give()}), max_new_tokens=4) == answer
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": 4, "return_full_text": False}
    answers = [
        ask(text=chat({"type": "image", "image": image}), **settings)[0]["generated_text"] for image in (PHOTO, give())
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", [None, "name-in-an-archive.png"])
def test_a_block_as_datasets_has_it(name: str | None) -> None:
    processor = FusionProcessor.from_pretrained(nano_path())
    expected = processor.image_processor(PHOTO, return_tensors="pt")["pixel_values"]
    messages = chat({"type": "image", "bytes": CONTENT, "path": name})
    assert torch.equal(encode(processor, messages)["pixel_values"], expected)
    batch = FusionDataCollator(processor)([{"messages": [*messages, ANSWER]}])
    assert torch.equal(batch["pixel_values"], expected)


def test_bytes_of_a_question(path: str) -> None:
    records = [{"question": QUESTION, "image": image} for image in (path, {"bytes": CONTENT, "path": None}, PHOTO)]
    answers = [result["answer"] for result in batch_generate(records, progress=False)]
    assert answers[0] and answers[0] == answers[1] == answers[2]


BROKEN: dict[str, tuple[Any, str]] = {
    "no image": (b"just text", r"of 9 bytes cannot be opened: it cannot be decoded"),
    "no bytes": (b"", r"of 0 bytes cannot be opened: it cannot be decoded"),
    "stream": (io.BytesIO(b"just text"), r"of type BytesIO cannot be opened: it cannot be decoded"),
    "text stream": (io.StringIO("text"), r"its stream must return bytes.*got str"),
    "datasets, neither": ({"bytes": None, "path": None}, r"keys 'bytes' and 'path'.*got 'bytes', 'path'"),
    "datasets, no file": ({"bytes": None, "path": "no/such.png"}, r"An image must be a file.*got 'no/such\.png'"),
    "datasets, broken": ({"bytes": b"text", "path": "a.png"}, r"of 4 bytes cannot be opened"),
    "another dict": ({"uri": "a.png"}, r"keys 'bytes' and 'path'.*got 'uri'"),
    "truncated": (CONTENT[:20_000], r"of 20000 bytes cannot be used: it cannot be decoded"),
    "bomb": (png_claiming(50_000), r"cannot be opened.*exceeds limit"),
    "number": (3, r"of type int cannot be opened: an image must be a path"),
    "set": ({"a.png"}, r"of type set cannot be opened: an image must be a path"),
    "directory": (Path("/"), "An image must be a file.*got '/'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_sources_without_an_image(name: str) -> None:
    source, words = BROKEN[name]
    processor = FusionProcessor.from_pretrained(nano_path())
    for call in (
        lambda: processor.image_processor(source),
        lambda: processor(images=source, text="<image><latent_image>a"),
        lambda: FusionDataCollator(processor)(
            [{"messages": [{"role": "user", "content": QUESTION}, ANSWER], "image": source}]
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(InputError, match="Use another image"):
        ChatModel(None, processor).open_image(source)  # type: ignore[arg-type]


def test_limits_hold_for_bytes() -> None:
    processor = FusionProcessor.from_pretrained(nano_path())
    for source in (CONTENT, io.BytesIO(CONTENT), {"bytes": CONTENT, "path": None}):
        with pytest.raises(OversizedImage, match=r"512 x 300 = 153600 pixels, more than max_image_pixels = 1000"):
            processor.image_processor(source, max_image_pixels=1000)


def test_a_broken_image_among_others_is_named(tmp_path: Path, path: str) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(CONTENT[:20_000])
    processor = FusionProcessor.from_pretrained(nano_path())
    prompts = ["<image><latent_image>a"] * 3
    with pytest.raises(ImageError, match=r"broken\.png' cannot be used: it cannot be decoded"):
        processor(images=[path, str(broken), path], text=prompts)


IN_A_PROCESS = """
import json, os, re, resource, sys
from pathlib import Path
from fusion_hf import FusionProcessor, nano_path
from fusion_hf.training.collator import FusionDataCollator

def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

path, count, spare_files = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
processor = FusionProcessor.from_pretrained(nano_path())
turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]

def encode(paths):
    content = [[{"type": "image", "path": path}, {"type": "text", "text": "what?"}] for path in paths]
    chats = [[{"role": "user", "content": each}] for each in content]
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt")

places = {
    "image processor": lambda paths: processor.image_processor(paths, return_tensors="pt"),
    "processor": lambda paths: processor(
        images=[[path] for path in paths], text=["<image><latent_image>a"] * len(paths), return_tensors="pt"
    ),
    "chat template": encode,
    "collator": lambda paths: FusionDataCollator(processor)([{"messages": turns, "image": path} for path in paths]),
}
for call in places.values():
    call([path])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare_files, hard))
for place, call in places.items():
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    shape = call([path] * count)["pixel_values"].shape
    print(json.dumps({"place": place, "images": shape[0], "grown": memory("VmHWM") - before}))
"""
PLACES = ["image processor", "processor", "chat template", "collator"]
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


def in_a_process(path: Path, count: int) -> list[dict[str, Any]]:
    """What each place does with `count` paths, where three more files than before can be open."""
    command = [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS, str(path), str(count), "3"]
    lines = subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.splitlines()
    seen = [json.loads(line) for line in lines]
    assert [each["place"] for each in seen] == PLACES
    assert [each["images"] for each in seen] == [count] * len(PLACES)
    return seen


@needs_proc
def test_three_hundred_paths_open_one_file_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "small.png"
    PHOTO.resize((40, 40)).save(file)
    in_a_process(file, 300)


@needs_proc
@pytest.mark.slow
def test_images_are_decoded_one_after_another(tmp_path: Path) -> None:
    """Sixteen of nine megapixels would take 432 MB at once; one takes 27 MB."""
    file = tmp_path / "large.jpg"
    PHOTO.resize((3000, 3000)).save(file, quality=20)
    for seen in in_a_process(file, 16):
        assert seen["grown"] < 4 * 3 * 3000**2, seen


# what a server does with a connection


def be_silent(connection: socket.socket, stop: threading.Event) -> None:
    connection.recv(2**16)
    stop.wait()


def send_headers_slowly(connection: socket.socket, stop: threading.Event) -> None:
    connection.recv(2**16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Header: ")
    while not stop.wait(0.1):
        connection.sendall(b"a")


def send_content_slowly(connection: socket.socket, stop: threading.Event) -> None:
    connection.recv(2**16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n")
    while not stop.wait(0.1):
        connection.sendall(b"a")


def never_read(connection: socket.socket, stop: threading.Event) -> None:
    stop.wait()


def send_content_without_length(connection: socket.socket, stop: threading.Event) -> None:
    """An image whose end is the connection's; what has arrived until it is shut is no image."""
    connection.recv(2**16)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + CONTENT)
    while not stop.wait(0.1):
        connection.sendall(b"a")


SLOW = (send_content_without_length, be_silent, send_headers_slowly, send_content_slowly, never_read)


@contextmanager
def serving(serve: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """The address of an image on a server that treats each connection so."""
    with serve_connections(serve) as port:
        yield f"http://127.0.0.1:{port}/a.png"


HUNG_SECONDS = 60  # no server above ends by itself


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(image_sources_fusion, "MAX_DOWNLOAD_SECONDS", 1.0)
    return 1.0


PLACES_OF_ADDRESSES: dict[str, Callable[[FusionProcessor, str], Any]] = {
    "image processor": lambda processor, url: processor.image_processor(url),
    "fetch_images": lambda processor, url: processor.image_processor.fetch_images([url]),
    "processor": lambda processor, url: processor(images=url, text="<image><latent_image>a"),
    "chat template, image": lambda processor, url: encode(processor, chat({"type": "image", "image": url})),
    "chat template, url": lambda processor, url: encode(processor, chat({"type": "image", "url": url})),
    "chat template, OpenAI": lambda processor, url: encode(
        processor, chat({"type": "image_url", "image_url": {"url": url}})
    ),
    "collator": lambda processor, url: FusionDataCollator(processor)(
        [{"messages": [{"role": "user", "content": QUESTION}, ANSWER], "image": url}]
    ),
    "datasets": lambda processor, url: processor.image_processor({"bytes": None, "path": url}),
    "assistant": lambda processor, url: ChatModel(None, processor).open_image(url),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("place", PLACES_OF_ADDRESSES)
@pytest.mark.parametrize("serve", SLOW)
def test_a_server_that_never_answers(
    place: str, serve: Callable[[socket.socket, threading.Event], None], seconds: float
) -> None:
    processor = FusionProcessor.from_pretrained(nano_path())
    with serving(serve) as url:
        begin = time.monotonic()
        with pytest.raises(
            ValueError, match=rf"{re.escape(url)}' cannot be opened: it did not arrive within 1 seconds"
        ):
            PLACES_OF_ADDRESSES[place](processor, url)
        assert seconds <= time.monotonic() - begin < HUNG_SECONDS


def downloads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_DownloadThread" in type(thread).__name__}


def test_no_thread_stays_behind(seconds: float) -> None:
    """A server that goes on sending does not keep the download alive."""
    processor = FusionProcessor.from_pretrained(nano_path())
    for serve in SLOW:
        with serving(serve) as url:
            before = downloads()
            with pytest.raises(ValueError, match="did not arrive"):
                processor.image_processor(url)
            wait_until(lambda before=before: downloads() <= before, HUNG_SECONDS)


@pytest.mark.slow
def test_the_stated_time() -> None:
    """In a process of its own, as it is installed: the time that the guide states."""
    guide = Path(__file__).parents[2].joinpath("docs", "images.md").read_text(encoding="utf-8")
    assert f"within {MAX_DOWNLOAD_SECONDS:g} seconds" in guide
    script = "import sys; from fusion_hf import FusionImageProcessor; FusionImageProcessor()(sys.argv[1])"
    begins: list[float] = []

    def note_and_be_silent(connection: socket.socket, stop: threading.Event) -> None:
        begins.append(time.monotonic())
        be_silent(connection, stop)

    with serving(note_and_be_silent) as url:
        done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, timeout=120)
        elapsed = time.monotonic() - begins[0]  # without the imports
    assert (
        f"The image '{url}' cannot be opened: it did not arrive within {MAX_DOWNLOAD_SECONDS:g} seconds."
        in done.stderr
    )
    assert MAX_DOWNLOAD_SECONDS - 1 < elapsed < MAX_DOWNLOAD_SECONDS + 30  # connecting is part of it


def test_images_at_addresses_arrive_whole_and_redirected() -> None:
    def respond(request: Request) -> Response:
        if request.path == "/photo.png":
            return Response([CONTENT], closes=True)  # without a length
        there = "/photo.png" if request.path == "/moved.png" else "/again.png"
        return Response(status=302, headers={"Location": there})

    processor = FusionProcessor.from_pretrained(nano_path())
    expected = processor.image_processor(PHOTO, return_tensors="pt")["pixel_values"]
    with HttpServer(respond) as server:
        root = server.url
        for url in (f"{root}/photo.png", f"{root}/moved.png", f"{root}/photo.png".replace("http", "HTTP", 1)):
            found = encode(processor, chat({"type": "image", "url": url}))
            assert torch.equal(found["pixel_values"], expected)
        with pytest.raises(ValueError, match=r"circle\.png' cannot be opened: .*redirect"):
            processor.image_processor(f"{root}/circle.png")


@pytest.mark.parametrize(
    "url", ["http://[::g]/a.png", "http://\ud800/a.png", "http://127.0.0.1:1/a.png", "http:///a.png", "https://"]
)
def test_addresses_where_nothing_is(url: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be opened|must be a file"):
        FusionProcessor.from_pretrained(nano_path()).image_processor(url)
