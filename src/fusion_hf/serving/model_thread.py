"""The one thread that uses the model: prompts in the order of arrival, and tokens of all answers together."""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.serving.joint_decoding import DecodingRow, RowBatch

logger = logging.getLogger(__name__)


class Answer(ABC):
    """
    What is asked of the thread, which calls all methods.

    row: None until `begin` was called.
    ended: is set when the thread is done with it.
    """

    def __init__(self) -> None:
        self.row: DecodingRow | None = None
        self.ended: Future[None] = Future()

    @abstractmethod
    def begin(self) -> DecodingRow:
        """Return the row, whose prompt is processed next."""

    @abstractmethod
    def take(self, token: int) -> bool:
        """Take a further token; returns whether it is the last one."""

    @abstractmethod
    def catch(self) -> AbstractContextManager[None]:
        """Return what takes any error as this answer's end."""


@dataclass
class _Group:
    """Answers that decode together."""

    batch: RowBatch
    answers: list[Answer] = field(default_factory=list)


class ModelThread:
    """
    A round is the prompt of whoever waits longest, if there is room, and then a token of every answer that has begun.
    So nobody waits for the end of another's answer, and the model's code need not bear several threads.

    Args:
        chat_model: What answers.
        most: Answers at the same time.
    """

    def __init__(self, chat_model: ChatModel, most: int):
        self._model = chat_model.model
        self._short = chat_model.short_rope_length
        self._most = self._room = most
        self._arrivals: SimpleQueue[Answer | None] = SimpleQueue()
        self._waiting: deque[Answer] = deque()
        # by whether rows have outgrown Phi-3's short RoPE: a pass has one of the two for all its rows
        self._groups = {is_long: _Group(RowBatch(self._model)) for is_long in (False, True)}
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, answer: Answer) -> Future[None]:
        """Return what is set at the answer's end. May be called by any thread."""
        self._arrivals.put(answer)
        return answer.ended

    def close(self) -> None:
        """End without finishing any answer."""
        if self._thread.is_alive():
            self._arrivals.put(None)
            self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while self._receive():
            if self._waiting and sum(len(group.answers) for group in self._groups.values()) < self._room:
                self._begin(self._waiting.popleft())
            for group in self._groups.values():
                self._decode(group)
        for answer in (*self._waiting, *(answer for group in self._groups.values() for answer in group.answers)):
            answer.ended.set_result(None)

    def _receive(self) -> bool:
        """Take what has arrived, and wait for it if there is nothing else to do; False: this is the end."""
        is_idle = not self._waiting and not any(group.answers for group in self._groups.values())
        while is_idle or not self._arrivals.empty():
            answer = self._arrivals.get()
            if answer is None:
                return False
            self._waiting.append(answer)
            is_idle = False
        return True

    def _begin(self, answer: Answer) -> None:
        """Process a prompt, or a text that has outgrown its cache."""
        with self._errors_to(answer):
            if answer.row is None:
                answer.row = answer.begin()
            logits = answer.row.process(self._model)
            self._write(answer, logits)

    def _decode(self, group: _Group) -> None:
        """Make the next token of all answers in a group."""
        answers = group.answers
        if not answers:
            return
        group.answers, logits = [], None
        rows = [row_of(answer) for answer in answers]
        if len(answers) == 1:
            with self._errors_to(answers[0]):
                logits = group.batch.step(rows)
        else:
            try:
                logits = group.batch.step(rows)
            except Exception:  # such as too little memory: alone, each of them gets on or meets its own error
                logger.exception("%d answers together failed; fewer of them go on", len(answers))
        if logits is not None:
            for answer, row in zip(answers, logits.split(1), strict=True):
                self._write(answer, row)
        elif len(answers) > 1:
            self._room = len(answers) // 2
            self._waiting.extendleft(reversed(answers))
        if not group.answers:
            group.batch.clear()

    def _write(self, answer: Answer, logits: torch.Tensor) -> None:
        """Choose a token by its logits `(1, V)`; an answer that goes on joins those that decode."""
        with self._errors_to(answer):
            row = row_of(answer)
            if answer.take(int(row.choose(logits))):
                self._end(answer)
            elif row.length - 1 <= self._short < row.length:  # all keys change
                row.cache = None
                self._waiting.appendleft(answer)
            else:
                self._groups[row.length > self._short].answers.append(answer)

    def _end(self, answer: Answer) -> None:
        self._room = min(self._most, self._room + 1)
        answer.row = None
        answer.ended.set_result(None)

    @contextmanager
    def _errors_to(self, answer: Answer) -> Iterator[None]:
        with answer.catch():
            yield
            return
        self._end(answer)


def row_of(answer: Answer) -> DecodingRow:
    """Return the row of an answer that has begun."""
    assert answer.row is not None
    return answer.row
