"""Many clients at once, and how soon an answer begins. Slow."""

import io
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from tests.helpers.serving import (
    IMAGE_FILE,
    MODEL,
    QUESTION,
    Server,
    ask,
    data_uri,
    red_circle,
    run_server,
    stream_text,
    user,
)
from transformers.generation.streamers import BaseStreamer

from fusion_hf import FusionConfig, FusionForConditionalGeneration
from fusion_hf.drawing.drawn_images import DrawnImage, DrawnShape
from fusion_hf.inference import ChatModel, nano_path, question_message
from fusion_hf.model.processing_fusion import FusionProcessor

pytestmark = pytest.mark.slow

REQUESTS = 200
SIDE = 512  # pixels; the files are not compressed
MEGABYTE = 2**20
SLACK = 150 * MEGABYTE  # beside the requests' own bytes: what 4 answers at a time need
LEAK = 30 * MEGABYTE
POLL_SECONDS = 0.05
PAIRS = 15
RATIO = 1.2  # of the time to the first token over HTTP to that without
WORD = "red"  # the only one that the model of this test writes
QUESTIONS = (QUESTION, "what shape is in the image?", "is there a blue shape?")


@dataclass(frozen=True)
class Case:
    """A request, and the package's own answer to it."""

    url: str
    question: str
    query_len: int
    answer: str


@pytest.fixture(scope="module")
def cases(chat_model: ChatModel) -> list[Case]:
    """Images that differ, questions and numbers of latent tokens."""
    made = []
    for color in ("red", "blue", "green", "yellow"):
        shape = DrawnShape("circle", color, left=36, top=40, width=52, height=52)
        image = DrawnImage("single", background=(244, 241, 236), shapes=(shape,)).render().resize((SIDE, SIDE))
        content = io.BytesIO()
        image.save(content, "PNG", compress_level=0)
        for question in QUESTIONS:
            for query_len in (4, 16):
                own = chat_model.answer([question_message(question, Image.open(content))], 8, query_len)
                made.append(Case(data_uri(content.getvalue()), question, query_len, own))
    return made


@contextmanager
def peak_memory(server: Server) -> Iterator[list[int]]:
    """What the server's memory grew to, every now and then."""
    seen, is_over = [server.rss()], threading.Event()

    def watch() -> None:
        while not is_over.wait(POLL_SECONDS):
            seen.append(server.rss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()


def answer_of(client: openai.OpenAI, case: Case, stream: bool) -> str:
    settings = {"extra_body": {"query_len": case.query_len}, "max_tokens": 8, "stream": stream}
    reply = ask(client, user(case.question, case.url), **settings)
    return stream_text(reply) if stream else reply.choices[0].message.content


def ask_all(server: Server, cases: list[Case]) -> list[str]:
    """Wrong answers of REQUESTS requests that are sent at the same time."""
    client = server.client()
    gate = threading.Barrier(REQUESTS)

    def send(index: int) -> str | None:
        case = cases[index % len(cases)]
        gate.wait()
        answer = answer_of(client, case, stream=index % 2 == 0)
        return None if answer == case.answer else f"{index}: {answer!r} is not {case.answer!r}"

    with ThreadPoolExecutor(REQUESTS) as pool:
        return [wrong for wrong in pool.map(send, range(REQUESTS)) if wrong is not None]


def test_200_requests_at_once(cases: list[Case]):
    assert len({case.answer for case in cases}) > 3
    largest = max(len(case.url) for case in cases)
    with run_server("--queue-length", REQUESTS) as server:
        assert answer_of(server.client(), cases[0], stream=False) == cases[0].answer
        with peak_memory(server) as seen:
            assert ask_all(server, cases) == []
        assert max(seen) - seen[0] < REQUESTS * largest + SLACK
        server.wait_for(running=0, waiting=0)
        with peak_memory(server) as again:
            assert ask_all(server, cases) == []
        assert max(again) < max(seen) + LEAK


def test_200_requests_and_a_short_queue(cases: list[Case]):
    """Who is sent away learns it at once; all others get their answers."""
    with run_server("--queue-length", 8) as server:
        client = server.client()
        gate = threading.Barrier(REQUESTS)

        def send(index: int) -> str:
            case = cases[index % len(cases)]
            gate.wait()
            try:
                return "right" if answer_of(client, case, stream=False) == case.answer else "wrong"
            except openai.RateLimitError:
                return "sent away"

        with peak_memory(server) as seen, ThreadPoolExecutor(REQUESTS) as pool:
            outcomes = list(pool.map(send, range(REQUESTS)))
        assert outcomes.count("wrong") == 0
        assert outcomes.count("right") >= 12
        assert outcomes.count("sent away") > REQUESTS / 2
        assert max(seen) - seen[0] < SLACK
        server.wait_for(running=0, waiting=0)


@pytest.fixture(scope="module")
def middle_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and large enough for a prompt to take some tenths of a second; it says one word all the time."""
    folder = tmp_path_factory.mktemp("middle") / MODEL
    shutil.copytree(nano_path(), folder)
    config = FusionConfig.from_pretrained(folder)
    for part, width, layers in ((config.text_config, 512, 12), (config.vision_config, 384, 20)):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = width, 3 * width, layers
    config.text_config.head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    torch.manual_seed(0)
    model = FusionForConditionalGeneration(config)
    tokenizer = FusionProcessor.from_pretrained(folder).tokenizer
    (word,) = tokenizer(WORD, add_special_tokens=False)["input_ids"]
    model.generation_config.suppress_tokens = [i for i in range(config.text_config.vocab_size) if i != word]
    model.save_pretrained(folder)
    return folder


class FirstToken(BaseStreamer):
    """When the first token of an answer came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def seconds_without_server(chat_model: ChatModel) -> float:
    first = FirstToken()
    begin = time.perf_counter()
    chat_model.answer([question_message(QUESTION, chat_model.open_image(str(IMAGE_FILE)))], 4, streamer=first)
    return first.times[1] - begin


def seconds_over_http(client: openai.OpenAI) -> float:
    begin = time.perf_counter()
    with ask(client, user(QUESTION, red_circle()), max_tokens=4, stream=True) as chunks:
        text = next(text for chunk in chunks if (text := chunk.choices[0].delta.content))
        end = time.perf_counter()
        assert text == WORD
        assert len(list(chunks)) == 4  # three more, and the end
    return end - begin


def test_time_to_first_token(middle_model: Path):
    chat_model = ChatModel.load(str(middle_model), device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with run_server("--model", middle_model, OMP_NUM_THREADS="1") as server:
            client = server.client()
            seconds_without_server(chat_model), seconds_over_http(client)  # both warm
            pairs = [(seconds_without_server(chat_model), seconds_over_http(client)) for _ in range(PAIRS)]
    finally:
        torch.set_num_threads(threads)
    ratios = [ours / own for own, ours in pairs]
    assert statistics.median(ratios) < RATIO, pairs
