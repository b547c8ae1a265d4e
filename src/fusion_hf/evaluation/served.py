"""A model on a server, asked by the OpenAI protocol with several concurrent requests."""

import io
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from PIL import Image

from fusion_hf.common.endpoint_client import EndpointClient
from fusion_hf.common.endpoints import (
    CHAT,
    MODELS,
    EndpointUnavailable,
    RequestRejected,
    check_key,
    check_url,
    data_uri,
    endpoint_url,
)
from fusion_hf.common.errors import InputError, short_name
from fusion_hf.evaluation.answer_cache import Answer
from fusion_hf.evaluation.answering import Outcome
from fusion_hf.evaluation.prompting import EvaluationPrompt, Generation, Messages, RequestReader
from fusion_hf.evaluation.run_record import ModelRecord
from fusion_hf.hub.family import published_rows
from fusion_hf.inference.model_info import FINGERPRINT, INFO, MAX_LENGTH, ModelInfo
from fusion_hf.model.image_opening_fusion import ORIENTATION_TAG, TIFF, UPRIGHT, read_orientation
from fusion_hf.model.image_processing_fusion import FusionImageProcessor

PARALLEL = 4  # the number of requests that `fusion-hf serve` answers concurrently
TRIES = 8  # takes half a minute to a minute, in which a server can restart
SECONDS = 600.0  # timeout of a request, twice the limit of this package's server
CONNECT_TRIES = 3
KEY_OPTION = "--api-key-env"
WINDOW, WINDOW_PER_REQUEST = (
    64,
    4,
)  # each window waits for its slowest answer, so many concurrent requests need a larger one
UNKNOWN = "unknown"
MAX_STOPS = 4  # limit of the protocol
SEED_DIGITS = 8  # hexadecimal digits, as for the seed of a model in this process
EXIF, FILE = "exif", "file"  # keys in the `info` of an image
PNG = "image/png"


class ServedModel:
    """
    A model on a server; see `answering.Model`.

    Args:
        client: sends requests to the server.
        url: the address of the server, as `check_url` returns it.
        name: the name of the model on the server.
        entry: the entry of the model in the server's list.
        parallel: the number of concurrent requests.
        query_len: the number of latent tokens, see `ChatModel.answer`. None uses that of the server.
        image_token_grid: the side of the grid of image tokens, see `ChatModel.answer`. None uses that of the server.
    """

    device = torch.device("cpu")
    batch_size = 1

    def __init__(
        self,
        client: EndpointClient,
        url: str,
        name: str,
        entry: dict[str, Any],
        parallel: int = PARALLEL,
        query_len: int | None = None,
        image_token_grid: int | None = None,
    ):
        self.client = client
        self.url = url
        self.name = name
        self.parallel = parallel
        self.window = max(WINDOW, WINDOW_PER_REQUEST * parallel)
        given = {"query_len": query_len, "image_token_grid": image_token_grid}
        self.budget = {field: value for field, value in given.items() if value is not None}
        self.info = ModelInfo.read(entry.get(INFO))
        most = entry.get(MAX_LENGTH)
        self.max_length = most if isinstance(most, int) else None
        self.fingerprint = entry.get(FINGERPRINT)  # None if the server does not identify its model
        self.reader = RequestReader(self._identity(), open_unturned, _render, len)

    @classmethod
    def connect(
        cls, url: str, name: str | None = None, key_variable: str | None = None, **settings: Any
    ) -> "ServedModel":
        """
        Find a model on a server.

        Args:
            url: the address of the server. `/v1` is added if it has no path.
            name: the name of the model on the server. None uses its only model.
            key_variable: the environment variable with the API key.
            **settings: further arguments of this class.

        Raises:
            InputError: if no OpenAI-compatible server answers, or the model or the key does not exist.
        """
        check_key(key_variable, KEY_OPTION)
        try:
            base = check_url(url, KEY_OPTION)
        except ValueError as error:
            raise InputError(f"--{error}") from error
        client = EndpointClient(key_variable, SECONDS, TRIES)
        try:
            models = client.ask(endpoint_url(base, MODELS), tries=CONNECT_TRIES).get("data")
        except (RequestRejected, EndpointUnavailable) as error:
            raise InputError(f"--url {base} cannot be asked: {error}") from error
        if not isinstance(models, list) or not all(
            isinstance(model, dict) and isinstance(model.get("id"), str) for model in models
        ):
            raise InputError(f"--url must be an OpenAI-compatible server that lists its models, got {base}.")
        entries = {model["id"]: model for model in models}
        chosen = next(iter(entries)) if name is None and len(entries) == 1 else name
        if chosen is None or chosen not in entries:
            given = "no name" if name is None else repr(name)
            raise InputError(
                f"--model must be one of {', '.join(map(repr, entries)) or 'none'} at {base}, got {given}."
            )
        return cls(client, base, chosen, entries[chosen], **settings)

    def describe(self) -> ModelRecord:
        """Describe the model for the record of a run."""
        if self.info is None:
            revision = f"{self.name} at {self.url}"
            record = ModelRecord(self.name, revision, UNKNOWN, UNKNOWN, None, None, url=self.url)
        else:
            record = ModelRecord.of(self.name, self.info, self.url)
        return replace(
            record,
            query_len=self.budget.get("query_len", record.query_len),
            image_token_grid=self.budget.get("image_token_grid", record.image_token_grid),
            published=record.published if record.published in published_rows() else None,
        )

    def answer(self, prompts: Sequence[EvaluationPrompt]) -> Iterator[Outcome]:
        """
        Send prompts to the server, and yield each outcome as soon as it arrives.

        Args:
            prompts: the prompts.

        Raises:
            EndpointUnavailable: if the server stops answering. Answers that arrived before are yielded first.
        """
        stop = threading.Event()
        unavailable: EndpointUnavailable | None = None
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="ask") as threads:
            futures = {threads.submit(self._ask, prompt, stop): prompt for prompt in prompts}
            try:
                for future in as_completed(futures):
                    try:
                        outcome = self._outcome(futures[future], future)
                    except EndpointUnavailable as error:
                        unavailable = error if unavailable is None else unavailable
                        stop.set()
                    else:
                        if outcome is not None:
                            yield outcome
            finally:  # leaving early waits only for requests in progress
                stop.set()
        if unavailable is not None:
            raise unavailable

    def _outcome(self, prompt: EvaluationPrompt, future: "Future[Answer | None]") -> Outcome | None:
        """Return None for a prompt that was not asked any more. EndpointUnavailable is raised, see `answer`."""
        try:
            answer = future.result()
        except (RequestRejected, InputError, OSError) as error:  # an OSError concerns the file of an image
            return Outcome([prompt], None, str(error))
        return None if answer is None else Outcome([prompt], [answer])

    def _ask(self, prompt: EvaluationPrompt, stop: threading.Event) -> Answer | None:
        """Return None if nobody waits for the answer any more. Raise an error if there is no answer."""
        if stop.is_set():
            return None
        if not isinstance(prompt.wanted, Generation):
            raise InputError("Tasks that score options by log-likelihood are not supported with --url.")
        payload = self._payload(prompt, prompt.wanted)
        reply = self.client.ask(endpoint_url(self.url, CHAT), payload, stop)
        self._check_model(reply.get(FINGERPRINT))
        content = self._read(reply, prompt.wanted)
        return {"answer": prompt.wanted.cut(content)}

    def _payload(self, prompt: EvaluationPrompt, wanted: Generation) -> dict[str, Any]:
        if wanted.num_beams > 1:
            raise InputError(f"`num_beams` must be 1 with --url, got {wanted.num_beams}.")
        stops = [text for text in wanted.until if text]
        if len(stops) > MAX_STOPS:
            raise InputError(f"`until` must have at most {MAX_STOPS} texts with --url, got {len(stops)}.")
        uri = None if prompt.image is None else image_uri(prompt.image)
        payload: dict[str, Any] = {
            "model": self.name,
            "messages": [_protocol_message(message, uri) for message in prompt.messages],
            "max_tokens": wanted.max_new_tokens,
            "temperature": wanted.temperature,
            **self.budget,
        }
        if stops:
            payload["stop"] = stops
        if wanted.sampled:
            payload["seed"] = int(prompt.key[:SEED_DIGITS], 16)
            payload |= {} if wanted.top_p is None else {"top_p": wanted.top_p}
        return payload

    def _check_model(self, fingerprint: Any) -> None:
        """Raise EndpointUnavailable if the server has changed its model, dtype or token budget."""
        if self.fingerprint is not None and fingerprint != self.fingerprint:
            change = f"from {self.fingerprint!r} to {fingerprint!r}"
            raise EndpointUnavailable(f"{self.url} has changed its model {change} since the run started")

    def _read(self, reply: dict[str, Any], wanted: Generation) -> str:
        """Return the text of an answer. Raise RequestRejected if there is none, or the server ended it early."""
        try:
            choice = reply["choices"][0]
            content, reason, usage = choice["message"]["content"], choice.get("finish_reason"), reply.get("usage")
        except (LookupError, TypeError, AttributeError) as error:
            found = ", ".join(reply) or "nothing"
            raise RequestRejected(f"the reply must have choices[0].message.content, got {found}") from error
        if not isinstance(content, str):
            raise RequestRejected(f"the reply has no content (finish_reason is {reason!r})")
        if reason == "length" and isinstance(usage, dict):
            self._check_length(usage.get("prompt_tokens"), usage.get("completion_tokens"), wanted.max_new_tokens)
        return content

    def _check_length(self, read: Any, written: Any, most: int) -> None:
        """Raise RequestRejected if an answer ended before its maximum length, and not at the maximum of the model."""
        if not isinstance(read, int) or not isinstance(written, int) or written >= most:
            return
        if self.max_length is None or read + written < self.max_length:
            raise RequestRejected(
                f"the server ended the answer after {written} of {most} tokens, possibly because of --max-seconds"
            )

    def _identity(self) -> str:
        """Return what identifies the model, or the address of the server if nothing is known."""
        known: dict[str, Any] = {"url": self.url} if self.info is None else self.info.write()
        known.pop("device", None)
        return json.dumps(["served", self.name, known, self.budget], sort_keys=True)


def _protocol_message(message: dict[str, Any], uri: str | None) -> dict[str, Any]:
    """Convert a message of transformers to the OpenAI protocol."""
    shown = {"type": "image_url", "image_url": {"url": uri}}
    content = [shown if block["type"] == "image" else block for block in message["content"]]
    return {"role": message["role"], "content": content}


def _render(messages: Messages) -> str:
    """Return everything except the image, since the template of the server is unknown."""
    return json.dumps(
        [
            [message["role"], [block.get("text") if block["type"] == "text" else None for block in message["content"]]]
            for message in messages
        ],
        ensure_ascii=False,
    )


def open_unturned(source: str | Image.Image) -> Image.Image:
    """
    Open an image in RGB without applying its EXIF orientation, which the server's processor does.

    The orientation and the file are kept in the `info` of the image.

    Args:
        source: the path of an image, or an image.

    Raises:
        InputError: if the image cannot be read or is too large.
    """
    processor = FusionImageProcessor()
    try:
        given = processor.fetch_images(source)
        image = processor.process_image(given, exif_transpose=False).copy()
    except (ValueError, HTTPError) as error:
        raise InputError(f"{short_name(str(source))}: {error}") from error
    orientation = read_orientation(given)
    image.info = {}
    if orientation != UPRIGHT:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        image.info[EXIF] = exif.tobytes()
    # some releases of PIL orient TIFF images differently when they are read from memory, as a server does
    if isinstance(source, str) and Path(source).is_file() and given.format != TIFF:
        image.info[FILE] = (source, Image.MIME[given.format])
    return image


def image_uri(image: Image.Image) -> str:
    """
    Return the file of an image from `open_unturned` as a data URI, or a PNG of its pixels if there is no file.

    Args:
        image: the image.
    """
    if FILE in image.info:
        name, kind = image.info[FILE]
        content = Path(name).read_bytes()
    else:
        stream, kind = io.BytesIO(), PNG
        image.save(stream, "PNG", exif=image.info.get(EXIF, b""))
        content = stream.getvalue()
    return data_uri(content, kind)
