"""Requests to a language model as a step of datatrove. Answers are written to disk as soon as they arrive."""

import asyncio
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.inference.checkpointing import CheckpointManager
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.servers import InferenceServer, SGLangServer, VLLMServer
from datatrove.pipeline.inference.types import InferenceError, ServerError
from datatrove.pipeline.writers.jsonl import JsonlWriter

from fusion_hf.common.endpoint_client import EndpointClient
from fusion_hf.common.endpoints import CHAT, EndpointUnavailable, RequestRejected, endpoint_url
from fusion_hf.common.outputs import write_atomically
from fusion_hf.synthesis.rollouts import RecordRollout
from fusion_hf.synthesis.run_config import EndpointSettings
from fusion_hf.synthesis.structured_answers import TOKENS


class _ChatServer(InferenceServer):
    """
    Send requests with `EndpointClient`.

    datatrove's own client has no limits and no key for a local server, and it ends the task at the first HTTP 500.
    """

    def __init__(self, config: InferenceConfig, rank: int, endpoint: EndpointSettings):
        super().__init__(config, rank)
        self.url = endpoint.url
        self.client = EndpointClient(
            endpoint.key_variable, endpoint.timeout, endpoint.patience, retries_timeouts=True, alive_since_begin=True
        )

    async def _make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await self.client.ask_async(endpoint_url(self.url or self.get_base_url(), CHAT), payload)
        except RequestRejected as error:
            raise InferenceError(None, str(error)) from error
        except EndpointUnavailable as error:
            raise ServerError(str(error)) from error
        return _checked(answer)

    async def server_cleanup(self) -> None:
        """Close the connections, and stop a server that was started."""
        await super().server_cleanup()
        await self.client.close()


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a response that are used. Raise an InferenceError if it does not follow the protocol."""
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
        raise InferenceError(
            None, f"the response is not a chat completion ({type(error).__name__}: {error})"
        ) from error


class _RunningServer(_ChatServer):
    """A server that is already running."""

    async def start_server(self) -> None:
        """Do nothing, since the server is running."""

    async def monitor_health(self) -> None:
        """Wait forever, since requests reveal a failure, and returning would mean that the server has died."""
        await asyncio.Future()

    async def _wait_until_ready(self, max_attempts: int = 0, delay_sec: float = 0.0) -> None:
        """Do nothing, since the first request reveals a failure and some endpoints do not list their models."""


class _StartedVLLM(_ChatServer, VLLMServer):
    """A vLLM server that datatrove starts."""


class _StartedSGLang(_ChatServer, SGLangServer):
    """An SGLang server that datatrove starts."""


SERVERS: dict[str, type[_ChatServer]] = {"endpoint": _RunningServer, "vllm": _StartedVLLM, "sglang": _StartedSGLang}


class _Checkpoints(CheckpointManager):
    """
    datatrove's checkpoints in an order that survives a kill at any moment.

    A chunk is marked as done atomically, before the files that could repeat it are removed.
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


class RequestStep(InferenceRunner):
    """
    Apply a rollout to each document, and write the documents in the order in which they finish.

    Each chunk is a file `FOLDER/RANK/CHUNK.jsonl`. A task that is restarted after a kill repeats only the requests
    that were in progress.

    Args:
        name: the name of the stage, for datatrove's tables.
        rollout: the rollout.
        folder: the folder of the output files.
        checkpoints: a folder that no other step uses.
        chunk: the number of documents per output file, which must be the same in every start.
    """

    def __init__(self, name: str, rollout: RecordRollout, folder: Path, checkpoints: Path, chunk: int):
        endpoint = rollout.endpoint
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
        self.progress = rollout.progress
        self.checkpoint_manager = _Checkpoints(str(checkpoints), chunk, request_cache=self.request_cache)

    def _init_server(self, rank: int) -> InferenceServer:
        return SERVERS[self.endpoint.server](self.config, rank, self.endpoint)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        super().run(data, rank, world_size)
        self.progress.flush()

    async def _save_document(self, document: Document, *args: Any, **kwargs: Any) -> None:
        """Save a document as datatrove does, but raise an error if it cannot be written."""
        before = self._failed_documents()
        await super()._save_document(document, *args, **kwargs)
        if self._failed_documents() > before:
            raise OSError(f"Record {document.id} cannot be written to {self.folder}. Is the disk full?")

    def _failed_documents(self) -> float:
        return self.stats["failed_documents"].total
