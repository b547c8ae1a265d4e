"""Requests to a language model as a step of datatrove: structured answers, on disk as soon as they are there."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from datatrove.data import Document
from datatrove.pipeline.inference.checkpointing import CheckpointManager
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.servers import InferenceServer, SGLangServer, VLLMServer
from datatrove.pipeline.inference.types import InferenceError, InferenceResult, ServerError
from datatrove.pipeline.writers.jsonl import JsonlWriter
from pydantic import BaseModel, ValidationError

from fusion_hf.common.endpoints import CHAT, Refused, Unavailable, endpoint_url
from fusion_hf.common.outputs import write_atomically
from fusion_hf.synthesis.config import Endpoint
from fusion_hf.synthesis.endpoints import Poster
from fusion_hf.synthesis.progress import Progress

A = TypeVar("A", bound=BaseModel)
Generate = Callable[[dict[str, Any]], Awaitable[InferenceResult]]
Rollout = Callable[[Document, Generate], Awaitable[Any]]

CUT = "length"  # the finish reason of an answer that was not finished
MAX_SEED = 2**31 - 1  # some servers hold a seed in 32 bits
SEED_STEP = 7919  # between two tries
TOKENS = ("prompt_tokens", "completion_tokens")  # of a response's usage
SHOWN = 200  # characters of what is wrong with an answer


@dataclass(frozen=True)
class Structured:
    """
    What became of a structured request.

    Attributes:
        answer: None if there is a `reason` why there is no valid one.
        seed: of the last try.
        usage: requests and tokens of all tries.
    """

    answer: Any
    reason: str | None
    seed: int
    usage: dict[str, int]


def hash_prompt(prompt: str) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(prompt.encode("utf-8", "backslashreplace")).hexdigest()


def usage_of(result: InferenceResult) -> dict[str, int]:
    """One request and its tokens."""
    return {"requests": 1, **{name: result.usage.get(name, 0) for name in TOKENS}}


def make_payload(endpoint: Endpoint, prompt: str | list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """A chat request; `prompt` is a text, or the blocks of a message."""
    return {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
        "seed": seed,
        **endpoint.arguments,
    }


async def ask_structured(
    generate: Generate, endpoint: Endpoint, prompt: str, model: type[BaseModel], seed: int
) -> Structured:
    """
    Ask until an answer is a valid `model`, each time with another seed: the same request would be answered from the
    cache of requests.
    """
    schema = model.model_json_schema()
    reason = ""
    usage: Counter[str] = Counter()
    for attempt in range(endpoint.tries):
        tried = (seed + attempt * SEED_STEP) % MAX_SEED
        payload = make_payload(endpoint, _with_shape(endpoint, prompt, schema), tried)
        payload |= _response_format(endpoint, model.__name__, schema)
        try:
            result = await generate(payload)
        except InferenceError as error:
            return Structured(None, f"refused: {error.error}", tried, dict(usage))
        usage.update(usage_of(result))
        if result.finish_reason == CUT:
            reason = f"the answer is longer than {endpoint.max_tokens} tokens"
            continue
        try:
            return Structured(model.model_validate_json(_json_part(result.text)), None, tried, dict(usage))
        except ValidationError as error:
            reason = _what_is_wrong(error)
    return Structured(None, f"no valid answer in {endpoint.tries} tries: {reason}", tried, dict(usage))


def _response_format(endpoint: Endpoint, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    if endpoint.structured == "prompt":
        return {}
    if endpoint.structured == "json_object":
        return {"response_format": {"type": "json_object"}}
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
    }


def _with_shape(endpoint: Endpoint, prompt: str, schema: dict[str, Any]) -> str:
    if endpoint.structured == "json_schema":
        return prompt
    return f"{prompt}\n\nAnswer with one JSON object of this schema and nothing else:\n{json.dumps(schema)}"


def _json_part(text: str) -> str:
    """From the first brace to the last: some models put words or a code fence around their JSON."""
    begin, end = text.find("{"), text.rfind("}")
    return text[begin : end + 1] if 0 <= begin < end else text


def _what_is_wrong(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg']}"[:SHOWN]


class _Posts(InferenceServer):
    """
    Sends requests by `Poster`. datatrove's own client has no bounds, no key for a local server, and ends the task at
    the first HTTP 500.
    """

    endpoint: Endpoint
    poster: Poster | None = None

    async def _make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        if self.poster is None:
            base = self.endpoint.url or self.get_base_url()
            self.poster = Poster(
                endpoint_url(base, CHAT), self.endpoint.key_variable, self.endpoint.timeout, self.endpoint.patience
            )
        try:
            answer = await self.poster.post(payload)
        except Refused as error:
            raise InferenceError(None, str(error)) from error
        except Unavailable as error:
            raise ServerError(str(error)) from error
        return _checked(answer)


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """
    The parts of a response that are used.

    Raises:
        InferenceError: if it has not the shape of the protocol.
    """
    try:
        choice = answer["choices"][0]
        content = choice["message"].get("content") or ""
        usage = answer.get("usage") or {}
        counts = {name: int(usage.get(name) or 0) for name in TOKENS}
        if not isinstance(content, str):
            raise TypeError(f"content is {type(content).__name__}")
        return {
            "choices": [{"message": {"content": content}, "finish_reason": str(choice.get("finish_reason"))}],
            "usage": counts,
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InferenceError(None, f"the response is no chat completion ({type(error).__name__}: {error})") from error


class _Running(_Posts):
    """A server that somebody else runs."""

    async def start_server(self) -> None:
        """There is nothing to start."""

    async def monitor_health(self) -> None:
        """The requests will tell; an end would mean that the server has died."""
        await asyncio.Future()

    async def _wait_until_ready(self, max_attempts: int = 0, delay_sec: float = 0.0) -> None:
        """The first request will tell: not every endpoint lists its models."""

    async def server_cleanup(self) -> None:
        """Close the connections."""
        await super().server_cleanup()
        if self.poster is not None:
            await self.poster.close()


class _Vllm(_Posts, VLLMServer):
    """vLLM, started by datatrove."""


class _SGLang(_Posts, SGLangServer):
    """SGLang, started by datatrove."""


SERVERS: dict[str, type[_Posts]] = {"endpoint": _Running, "vllm": _Vllm, "sglang": _SGLang}


class _Checkpoints(CheckpointManager):
    """
    datatrove's checkpoints in an order that survives a kill at any moment: a chunk is noted as done, in one step,
    before what could do it again is removed.
    """

    async def update_last_chunk_index(self, rank: int) -> None:
        async with self.checkpoint_file_lock:
            while self.last_chunk_index + 1 in self.new_completed_chunks:
                self.last_chunk_index += 1
                done = self.last_chunk_index
                folder = Path(self.checkpoints_local_dir)
                write_atomically(folder / "last_chunk" / f"{rank:05d}.txt", str(done).encode())
                async with self.file_locks[done]:
                    (folder / f"{rank:05d}" / f"chunk_{done:05d}.jsonl").unlink(missing_ok=True)
                self.file_locks.pop(done)
                self.per_chunk_counts.pop(done, None)
                self.new_completed_chunks.remove(done)
                if self.request_cache is not None:
                    await self.request_cache.drop_chunk(done)


class Requests(InferenceRunner):
    """
    Runs a rollout on each document and writes the documents in the order in which they are done, a file for each
    chunk: `FOLDER/RANK/CHUNK.jsonl`.

    A task that is started again after a kill repeats the requests that were in flight, and no others.

    Args:
        name: of the stage, for datatrove's tables.
        checkpoints: a folder that this step alone uses.
        chunk: documents of one output file; the same in every start.
        progress: which the rollout counts in.
    """

    def __init__(
        self,
        name: str,
        rollout: Rollout,
        endpoint: Endpoint,
        folder: Path,
        checkpoints: Path,
        chunk: int,
        progress: Progress,
    ):
        config = InferenceConfig(
            server_type=endpoint.server,
            model_name_or_path=endpoint.model,
            endpoint_url=endpoint.url,
            max_concurrent_generations=endpoint.concurrency,
            model_kwargs=endpoint.server_arguments or None,
        )
        writer = JsonlWriter(str(folder), "${rank}/${chunk_index}.jsonl", compression=None)
        super().__init__(rollout, config, writer, checkpoints_local_dir=str(checkpoints), records_per_chunk=chunk)
        self.name = name
        self.endpoint = endpoint
        self.folder = folder
        self.progress = progress
        self.checkpoint_manager = _Checkpoints(str(checkpoints), chunk, request_cache=self.request_cache)

    def _init_server(self, rank: int) -> InferenceServer:
        server = SERVERS[self.endpoint.server](self.config, rank)
        server.endpoint = self.endpoint
        return server

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        super().run(data, rank, world_size)
        self.progress.flush()

    async def _save_document(self, document: Document, *args: Any, **kwargs: Any) -> None:
        """As datatrove's, which passes over a document that cannot be written."""
        before = self._failed_documents()
        await super()._save_document(document, *args, **kwargs)
        if self._failed_documents() > before:
            raise OSError(f"record {document.id} cannot be written to {self.folder} (is the disk full?)")

    def _failed_documents(self) -> float:
        return self.stats["failed_documents"].total
