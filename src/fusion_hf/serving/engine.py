"""Answers to many requests by one model: each by itself, taking turns token by token, in the order of arrival."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from fusion_hf.common.errors import InputError
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.image_feature_cache import ImageFeatureCache
from fusion_hf.inference.image_features import join_features
from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.serving.api_errors import BAD_REQUEST, INTERNAL, ApiError, overloaded
from fusion_hf.serving.chat_requests import ChatRequest
from fusion_hf.serving.generation import AnswerText, SamplingLogitsProcessor, StopCondition
from fusion_hf.serving.image_workers import ImageWorkers
from fusion_hf.serving.limits import Limits

logger = logging.getLogger(__name__)
TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class Piece:
    """A further piece of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer: `"stop"` or `"length"`, tokens read and written."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(eq=False)
class _Job:
    """A request on its way; `events` belongs to the event loop `loop`, the rest to whoever has it."""

    request: ChatRequest
    image: bytes | None  # the file, until it is decoded
    deadline: float  # of the monotonic clock
    loop: asyncio.AbstractEventLoop
    tiles: np.ndarray | None = None  # (5, 3, H, W), uint8
    events: asyncio.Queue[Piece | Finished | ApiError] = field(default_factory=asyncio.Queue)
    is_begun: bool = False
    is_cancelled: bool = False

    def emit(self, event: Piece | Finished | ApiError) -> None:
        """Called by the thread that answers."""
        if not self.is_cancelled:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or time.monotonic() > self.deadline


class FairLock:
    """A lock that threads get in the order in which they ask for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_taken:
                self._is_taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def __exit__(self, *error: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_taken = False

    def yield_to_others(self) -> None:
        """Let everybody who waits have a turn before one's own next."""
        if self._waiting:
            self.__exit__()
            self.__enter__()


class Engine:
    """
    Up to `limits.parallel` answers are on their way at the same time. Only one of them uses the model at any moment:
    after each token the next one is up, so that a long answer keeps no other from being made, the model's code need
    not bear several threads, and each answer is that of a request alone.
    """

    def __init__(self, chat_model: ChatModel, limits: Limits, budget: TokenBudget):
        self.chat_model = replace(chat_model, image_cache=ImageFeatureCache(limits.image_cache_bytes))
        self.budget = budget  # of requests that say nothing about it
        self.limits = limits
        self.max_prompt_tokens = min(limits.prompt_tokens, chat_model.max_length - 1)
        self.longest_token = max(map(len, chat_model.processor.tokenizer.get_vocab()))  # characters
        self._images = ImageWorkers(chat_model.processor.image_processor, limits)
        self._is_ending = False
        self._lock = FairLock()
        self._slots = asyncio.Semaphore(limits.parallel)
        self._threads = ThreadPoolExecutor(limits.parallel, thread_name_prefix="answer")
        self._jobs: dict[asyncio.Task[None], _Job] = {}

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(job.is_begun for job in self._jobs.values())

    async def answer(
        self, request: ChatRequest, image: bytes | None, deadline: float
    ) -> AsyncGenerator[Piece | Finished, None]:
        """
        Pieces of text, then the end. Whoever closes this generator before ends the answer and frees its slot. After
        the deadline (of the monotonic clock) an answer that has begun ends with what there is.

        Raises:
            ApiError: before the first piece, if the request cannot be answered, or not until its deadline.
        """
        if self._is_ending:
            raise too_late()
        job = _Job(request, image, deadline, asyncio.get_running_loop())
        del image  # which would stay until the answer's end
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
        """Start what decodes images."""
        await self._images.start()

    def finish_soon(self) -> None:
        """End all answers with what there is, and begin no more."""
        self._is_ending = True
        for job in self._jobs.values():
            job.deadline = time.monotonic()
            if not job.is_begun:
                job.emit(too_late())

    async def close(self) -> None:
        """End all answers."""
        await self._images.close()
        for job in self._jobs.values():
            job.is_cancelled = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def _run(self, job: _Job) -> None:
        with self._errors_to(job):
            self._check_length_roughly(job.request.messages, self._budget(job.request))
            if job.image is not None:
                # before the job has a slot: whatever an image costs, the model is there for others
                job.tiles, job.image = await self._images.cut_tiles(job.image), None
            async with self._slots:
                job.is_begun = True
                if not job.is_cancelled:
                    await job.loop.run_in_executor(self._threads, self._work, job)

    def _work(self, job: _Job) -> None:
        with self._errors_to(job):
            job.emit(self._generate(job))

    @contextmanager
    def _errors_to(self, job: _Job) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            job.emit(error)
        except InputError as error:
            job.emit(ApiError(BAD_REQUEST, str(error)))
        except torch.OutOfMemoryError:
            logger.exception("a request needs too much memory")
            job.emit(overloaded("The model has too little memory for this request now."))
        except Exception:  # the last resort: the client gets an answer, the log gets the reason
            logger.exception("a request failed")
            job.emit(ApiError(INTERNAL, "The request failed; the server's log says why."))

    def _generate(self, job: _Job) -> Finished:
        request, chat_model = job.request, self.chat_model
        budget = self._budget(request)
        with self._lock:
            if job.is_over:  # a prompt takes long, and nobody waits for it
                raise too_late()
            inputs = chat_model.prepare_batch(
                [request.messages], budget, process_images=False, add_generation_prompt=True
            )
            prompt_tokens = inputs["input_ids"].shape[1]
            self._check_length(prompt_tokens)
            if job.tiles is not None:
                inputs.update(join_features([chat_model.encode_cut_image(job.tiles, budget.query_len)]))
            text = AnswerText(chat_model.processor.tokenizer, request.stop, lambda piece: job.emit(Piece(piece)))

            def is_over() -> bool:
                if job.is_over or text.is_stopped:
                    return True
                self._lock.yield_to_others()
                return job.is_over

            draw = [SamplingLogitsProcessor(request.sampling)] if request.sampling.temperature > 0 else []
            output = chat_model.generate(
                inputs,
                request.max_tokens,
                text,
                stopping_criteria=StoppingCriteriaList([StopCondition(is_over)]),
                logits_processor=LogitsProcessorList(draw),
            )
        written = output.sequences[0, prompt_tokens:].tolist()
        is_whole = text.is_stopped or written[-1] in self._end_ids()
        return Finished("stop" if is_whole else "length", prompt_tokens, len(written))

    def _end_ids(self) -> list[int]:
        ends = self.chat_model.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def _budget(self, request: ChatRequest) -> TokenBudget:
        grid = request.image_token_grid or self.budget.image_token_grid
        return self.chat_model.token_budget(request.query_len or self.budget.query_len, grid)

    def _check_length_roughly(self, messages: list[dict[str, Any]], budget: TokenBudget) -> None:
        """Refuse at once what would take long to tokenise only to be refused: surely too long prompts."""
        questions = sum(message["role"] == "user" for message in messages)
        blocks = [block for message in messages for block in message["content"]]
        characters = sum(len(block["text"]) for block in blocks if block["type"] == "text")
        least = questions * budget.query_len + characters // self.longest_token
        if len(blocks) > sum(block["type"] == "text" for block in blocks):
            least += budget.num_image_tokens
        self._check_length(least, "at least ")

    def _check_length(self, tokens: int, about: str = "") -> None:
        if tokens > self.max_prompt_tokens:
            message = f"The prompt has {about}{tokens} tokens; allowed: {self.max_prompt_tokens}."
            raise ApiError(BAD_REQUEST, message, "messages", TOO_LONG)


async def _first_event(job: _Job) -> Piece | Finished | ApiError:
    """The first event; an `ApiError` if there is none until the deadline."""
    try:
        return await asyncio.wait_for(job.events.get(), job.deadline - time.monotonic())
    except asyncio.TimeoutError as error:
        raise too_late() from error


def too_late() -> ApiError:
    """Return the error of a request whose turn did not come in time."""
    return overloaded("No answer began within the time that a request may take.")
