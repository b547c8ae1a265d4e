"""Answer concurrent requests with one model, in the order of their arrival."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, LogitsProcessorList

from fusion_hf.common.errors import InputError
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.image_feature_cache import ImageFeatureCache
from fusion_hf.inference.image_features import join_features
from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.serving.api_errors import BAD_REQUEST, INTERNAL, ApiError, overloaded
from fusion_hf.serving.chat_requests import ChatRequest
from fusion_hf.serving.generation import AnswerText, SamplingLogitsProcessor
from fusion_hf.serving.image_workers import ImageWorkers
from fusion_hf.serving.joint_decoding import DecodingRow
from fusion_hf.serving.limits import Limits
from fusion_hf.serving.model_thread import Answer, ModelThread, row_of

logger = logging.getLogger(__name__)
TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class Piece:
    """A further piece of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """
    The end of an answer.

    Attributes:
        reason: `"stop"` or `"length"`.
        prompt_tokens: the number of tokens in the prompt.
        completion_tokens: the number of tokens in the answer.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int


class _Job(Answer):
    """
    A request in progress. `events` belongs to the event loop `loop`. Everything else belongs to the current
    holder.
    """

    def __init__(self, engine: "Engine", request: ChatRequest, image: bytes | None, deadline: float):
        """Make a job. `image` is the file until it is decoded, and `deadline` is a time of the monotonic clock."""
        super().__init__()
        self.engine = engine
        self.request = request
        self.image = image
        self.tiles: np.ndarray | None = None  # (5, 3, H, W), uint8
        self.deadline = deadline
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Piece | Finished | ApiError] = asyncio.Queue()
        self.is_begun = self.is_cancelled = False
        self.text = AnswerText(
            engine.chat_model.processor.tokenizer, request.stop, lambda piece: self.emit(Piece(piece))
        )
        self.prompt_tokens = 0

    def emit(self, event: Piece | Finished | ApiError) -> None:
        """Add an event. Any thread may call this."""
        if not self.is_cancelled:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or time.monotonic() > self.deadline

    def begin(self) -> DecodingRow:
        if self.is_over:  # avoids the cost of a prompt that nobody waits for
            raise too_late()
        inputs = self.engine.prepare(self.request, self.tiles)
        self.prompt_tokens = inputs["input_ids"].shape[1]
        sampling = self.request.sampling
        draw = [SamplingLogitsProcessor(sampling)] if sampling.temperature > 0 else []
        return DecodingRow.prepare(
            self.engine.chat_model, inputs, self.request.max_tokens, self.text, LogitsProcessorList(draw)
        )

    def take(self, token: int) -> bool:
        length, is_last = row_of(self).length, token in self.engine.end_ids
        self.text.put(torch.tensor([token]))
        if not (is_last or self.text.is_stopped or length >= row_of(self).max_length or self.is_over):
            return False
        self.text.end()
        reason = "stop" if is_last or self.text.is_stopped else "length"
        self.emit(Finished(reason, self.prompt_tokens, length - self.prompt_tokens))
        return True

    @contextmanager
    def catch(self) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            self.emit(error)
        except InputError as error:
            self.emit(ApiError(BAD_REQUEST, str(error)))
        except torch.OutOfMemoryError:
            logger.exception("There was not enough memory for a request")
            self.emit(overloaded("There is not enough memory for this request now."))
        except Exception:  # the last resort: the client gets a reply, and the reason is logged
            logger.exception("A request failed")
            self.emit(ApiError(INTERNAL, "The request failed. See the log of the server for the reason."))


class Engine:
    """
    Answer up to `limits.parallel` requests concurrently.

    Prompts are processed one after the other in the order of arrival, and all answers are then decoded together; see
    `ModelThread`.

    Args:
        chat_model: the model.
        limits: the limits on requests.
        budget: the numbers of image tokens and latent tokens of requests that do not set them.
    """

    def __init__(self, chat_model: ChatModel, limits: Limits, budget: TokenBudget):
        self.chat_model = replace(chat_model, image_cache=ImageFeatureCache(limits.image_cache_bytes))
        self.budget = budget
        self.limits = limits
        self.max_prompt_tokens = min(limits.prompt_tokens, chat_model.max_length - 1)
        ends = chat_model.model.generation_config.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends])
        self.longest_token = max(
            map(len, chat_model.processor.tokenizer.get_vocab())
        )  # length of the longest token in characters
        self._images = ImageWorkers(chat_model.processor.image_processor, limits)
        self._is_ending = False
        self._slots = asyncio.Semaphore(limits.parallel)
        self._model_thread = ModelThread(chat_model, limits.parallel)
        self._jobs: dict[asyncio.Task[None], _Job] = {}

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return sum(job.is_begun for job in self._jobs.values())

    async def answer(
        self, request: ChatRequest, image: bytes | None, deadline: float
    ) -> AsyncGenerator[Piece | Finished, None]:
        """
        Yield the pieces of an answer, and then its end.

        Closing this generator early ends the answer and frees its slot. After the deadline, an answer that has started
        ends with the text so far.

        Args:
            request: the request.
            image: the bytes of the image file, or None.
            deadline: the deadline on the monotonic clock.

        Raises:
            ApiError: before the first piece, if the request is invalid or could not be started before its deadline.
        """
        if self._is_ending:
            raise too_late()
        job = _Job(self, request, image, deadline)
        del image  # it would otherwise stay in memory until the end of the answer
        task = asyncio.create_task(self._run(job))
        self._jobs[task] = job
        task.add_done_callback(self._jobs.pop)
        try:
            event = await _first_event(job)
            while True:
                if isinstance(event, ApiError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
                event = await job.events.get()
        finally:
            job.is_cancelled = True
            if not job.is_begun:
                task.cancel()

    async def start(self) -> None:
        """Start the image workers and the model thread."""
        await self._images.start()
        self._model_thread.start()

    def finish_soon(self) -> None:
        """End all answers with the text so far, and start no further ones."""
        self._is_ending = True
        for job in self._jobs.values():
            job.deadline = time.monotonic()
            if not job.is_begun:
                job.emit(too_late())

    async def close(self) -> None:
        """End all answers at once."""
        await self._images.close()
        for job in self._jobs.values():
            job.is_cancelled = True
        self._model_thread.close()

    async def _run(self, job: _Job) -> None:
        with job.catch():
            self._check_length_roughly(job.request.messages, self._budget(job.request))
            if job.image is not None:
                # comes before the job has a slot, so that an expensive image does not block the model
                job.tiles, job.image = await self._images.cut_tiles(job.image), None
            async with self._slots:
                job.is_begun = True
                if not job.is_cancelled:
                    await asyncio.wrap_future(self._model_thread.submit(job))

    def prepare(self, request: ChatRequest, tiles: np.ndarray | None) -> BatchFeature:
        """
        Make the model inputs of a request.

        Args:
            request: the request.
            tiles: the tiles of its image `(5, 3, H, W)`, or None.

        Raises:
            ApiError: if the prompt is too long.
            InputError: if the model cannot read the prompt.
        """
        budget = self._budget(request)
        inputs = self.chat_model.prepare_batch(
            [request.messages], budget, process_images=False, add_generation_prompt=True
        )
        self._check_length(inputs["input_ids"].shape[1])
        if tiles is not None:
            inputs.update(join_features([self.chat_model.encode_cut_image(tiles, budget.query_len)]))
        return inputs

    def _budget(self, request: ChatRequest) -> TokenBudget:
        grid = request.image_token_grid or self.budget.image_token_grid
        return self.chat_model.token_budget(request.query_len or self.budget.query_len, grid)

    def _check_length_roughly(self, messages: list[dict[str, Any]], budget: TokenBudget) -> None:
        """Reject prompts that are certainly too long before the cost of tokenizing them."""
        questions = sum(message["role"] == "user" for message in messages)
        blocks = [block for message in messages for block in message["content"]]
        characters = sum(len(block["text"]) for block in blocks if block["type"] == "text")
        least = questions * budget.query_len + characters // self.longest_token
        if len(blocks) > sum(block["type"] == "text" for block in blocks):
            least += budget.num_image_tokens
        self._check_length(least, "at least ")

    def _check_length(self, tokens: int, about: str = "") -> None:
        if tokens > self.max_prompt_tokens:
            message = f"The prompt must have at most {self.max_prompt_tokens} tokens, got {about}{tokens}."
            raise ApiError(BAD_REQUEST, message, "messages", TOO_LONG)


async def _first_event(job: _Job) -> Piece | Finished | ApiError:
    """Return the first event, or an `ApiError` if there is none before the deadline."""
    try:
        return await asyncio.wait_for(job.events.get(), job.deadline - time.monotonic())
    except asyncio.TimeoutError as error:
        raise too_late() from error


def too_late() -> ApiError:
    """Make the error for a request that was not started in time."""
    return overloaded("The answer did not start within the time limit of a request. Try again soon.")
