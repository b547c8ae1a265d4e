"""The only thread that uses the model. It processes prompts in the order of arrival, and decodes all answers
together.
"""

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
    A request to the thread, which calls all methods.

    Attributes:
        row: None until `begin` is called.
        ended: set when the thread has finished the answer.
    """

    def __init__(self) -> None:
        self.row: DecodingRow | None = None
        self.ended: Future[None] = Future()

    @abstractmethod
    def begin(self) -> DecodingRow:
        """Return the row whose prompt is processed next."""

    @abstractmethod
    def take(self, token: int) -> bool:
        """
        Take a further token.

        Args:
            token: the id.

        Returns:
            Whether the answer ends with this token.
        """

    @abstractmethod
    def catch(self) -> AbstractContextManager[None]:
        """Return a context that turns any error into the end of this answer."""


@dataclass
class _Group:
    """Answers that decode together."""

    batch: RowBatch
    answers: list[Answer] = field(default_factory=list)


class ModelThread:
    """
    Run the model in rounds: the prompt of the request that has waited longest, if there is room, and then one token
    of every answer.

    So no request waits for the end of another answer, and the code of the model need not be thread-safe.

    Args:
        chat_model: the model.
        most: the maximum number of concurrent answers.
    """

    def __init__(self, chat_model: ChatModel, most: int):
        self._model = chat_model.model
        self._short = chat_model.short_rope_length
        self._most = self._room = most
        self._arrivals: SimpleQueue[Answer | None] = SimpleQueue()
        self._waiting: deque[Answer] = deque()
        # keyed by whether rows are longer than Phi-3's short RoPE, since a pass uses one RoPE for all rows
        self._groups = {is_long: _Group(RowBatch(self._model)) for is_long in (False, True)}
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, answer: Answer) -> Future[None]:
        """
        Add an answer. Any thread may call this.

        Args:
            answer: the answer.

        Returns:
            A future that is set at the end of the answer.
        """
        self._arrivals.put(answer)
        return answer.ended

    def close(self) -> None:
        """Stop without finishing any answer."""
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
        """Take new answers, and wait for them if there is nothing else to do. Return False if the thread must stop."""
        is_idle = not self._waiting and not any(group.answers for group in self._groups.values())
        while is_idle or not self._arrivals.empty():
            answer = self._arrivals.get()
            if answer is None:
                return False
            self._waiting.append(answer)
            is_idle = False
        return True

    def _begin(self, answer: Answer) -> None:
        """Process a prompt, or a text whose cache became invalid."""
        with self._errors_to(answer):
            if answer.row is None:
                answer.row = answer.begin()
            logits = answer.row.process(self._model)
            self._write(answer, logits)

    def _decode(self, group: _Group) -> None:
        """Generate the next token of all answers in a group."""
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
            except Exception:  # for example, not enough memory: each answer continues alone, or gets its own error
                logger.exception("Decoding %d answers together failed. They continue in smaller groups", len(answers))
        if logits is not None:
            for answer, row in zip(answers, logits.split(1), strict=True):
                self._write(answer, row)
        elif len(answers) > 1:
            self._room = len(answers) // 2
            self._waiting.extendleft(reversed(answers))
        if not group.answers:
            group.batch.clear()

    def _write(self, answer: Answer, logits: torch.Tensor) -> None:
        """Choose a token by its logits `(1, V)`. An answer that continues joins those that decode."""
        with self._errors_to(answer):
            row = row_of(answer)
            if answer.take(int(row.choose(logits))):
                self._end(answer)
            elif row.length - 1 <= self._short < row.length:  # the other RoPE changes all keys
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
    """
    Return the row of an answer that has started.

    Args:
        answer: the answer.
    """
    assert answer.row is not None
    return answer.row
