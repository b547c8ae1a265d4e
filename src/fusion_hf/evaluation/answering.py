"""Answer the requests of lmms-eval with a model, asking each question once, and record failures."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from tqdm import tqdm

from fusion_hf.common.endpoints import EndpointUnavailable
from fusion_hf.evaluation.answer_cache import Answer, AnswerCache, CachedAnswer
from fusion_hf.evaluation.prompting import EvaluationPrompt, Generation, Request, RequestReader
from fusion_hf.evaluation.run_record import ModelRecord
from fusion_hf.evaluation.sample_log import AskedQuestion
from fusion_hf.model.image_opening_fusion import BROKEN_IMAGE


@dataclass(frozen=True)
class Failure:
    """A request without an answer, and the reason."""

    task: str
    doc_id: int
    reason: str

    def __str__(self) -> str:
        return f"{self.task}, question {self.doc_id}: {self.reason}"


class Outcome(NamedTuple):
    """The answers to some prompts, or the reason why there are none."""

    prompts: list[EvaluationPrompt]
    answers: list[Answer] | None
    reason: str = ""


class Model(Protocol):
    """
    What answers prompts: a model in this process or on a server.

    Attributes:
        reader: makes the prompts.
        batch_size: the number of prompts that are answered together.
        window: the number of requests whose images are open at a time.
        device: the device on which lmms-eval exchanges values between processes.
    """

    reader: RequestReader
    batch_size: int
    window: int
    device: torch.device

    def describe(self) -> ModelRecord:
        """Describe the model for the record of a run."""

    def answer(self, prompts: Sequence[EvaluationPrompt]) -> Iterator[Outcome]:
        """
        Answer prompts, and yield the outcomes in any order.

        Args:
            prompts: the prompts.

        Raises:
            EndpointUnavailable: if no further prompt can be answered.
        """


class RequestAnswerer:
    """
    Answer requests with a model.

    Args:
        model: the model.
        cache: stores answers on disk. None keeps them in memory.
        progress: whether to show a progress bar in a terminal.
    """

    def __init__(self, model: Model, cache: AnswerCache | None = None, progress: bool = True):
        self.model = model
        self.cache = cache
        self.progress = progress
        self.failures: list[Failure] = []
        self.prompts: dict[tuple[str, int], list[AskedQuestion]] = {}  # prompts by task and question
        self.asked = 0  # number of prompts that the model has answered or failed to answer
        self._is_over = False  # True if no further prompt can be answered
        self._memory: dict[str, Answer] = {}

    def answer(self, requests: Sequence[Request]) -> list[Answer | None]:
        """
        Answer requests in their order.

        Args:
            requests: the requests.

        Returns:
            The answers. None stands for a request that failed, which is then listed in `failures`.
        """
        answers: list[Answer | None] = []
        numbered = _number_sampled(requests)
        self._is_over = False
        terminal = sys.__stderr__  # callers may redirect sys.stderr
        bar = tqdm(total=len(numbered), unit="question", file=terminal, disable=None if self.progress else True)
        with bar:
            for begin in range(0, len(numbered), self.model.window):
                window = numbered[begin : begin + self.model.window]
                answers += self._answer_window(window)
                bar.update(len(window))
                if self._is_over:
                    break
        return answers + [None] * (len(numbered) - len(answers))

    def _answer_window(self, requests: Sequence[Request]) -> list[Answer | None]:
        prompts = [self._read(request) for request in requests]
        new = {prompt.key: prompt for prompt in prompts if prompt is not None and self._known(prompt) is None}
        failed = self._ask(new) if new else {}
        answers: list[Answer | None] = []
        for request, prompt in zip(requests, prompts, strict=True):
            answer = None if prompt is None else self._known(prompt)
            if prompt is not None and prompt.key in failed:
                self._fail(request, failed[prompt.key])
            answers.append(answer)
        return answers

    def _ask(self, new: dict[str, EvaluationPrompt]) -> dict[str, str]:
        """
        Ask prompts, given by key, and store the answers. Return the reasons for prompts without an answer, by
        key.
        """
        failed: dict[str, str] = {}
        try:
            for outcome in self.model.answer(list(new.values())):
                self.asked += len(outcome.prompts)
                if outcome.answers is None:
                    failed.update({prompt.key: outcome.reason for prompt in outcome.prompts})
                else:
                    self._keep(outcome.prompts, outcome.answers)
        except EndpointUnavailable as error:  # one failure is reported, not thousands of prompts that were not asked
            self._is_over = True
            first = next(key for key, prompt in new.items() if key not in failed and self._known(prompt) is None)
            failed[first] = f"{error}. No further question was asked"
        return failed

    def _read(self, request: Request) -> EvaluationPrompt | None:
        try:
            prompt = self.model.reader.prompt(request)
        except BROKEN_IMAGE as error:
            self._fail(request, f"{type(error).__name__}: {error}")
            return None
        self.prompts.setdefault((request.task, request.doc_id), []).append(prompt.describe())
        return prompt

    def _fail(self, request: Request, reason: str) -> None:
        self.failures.append(Failure(request.task, request.doc_id, " ".join(reason.split())))

    def _known(self, prompt: EvaluationPrompt) -> Answer | None:
        return self._memory.get(prompt.key) if self.cache is None else self.cache.get(prompt.key)

    def _keep(self, batch: list[EvaluationPrompt], answers: list[Answer]) -> None:
        if self.cache is None:
            self._memory.update((prompt.key, answer) for prompt, answer in zip(batch, answers, strict=True))
            return
        pairs = zip(batch, answers, strict=True)
        self.cache.put([CachedAnswer(p.key, answer, p.request.task, p.request.doc_id) for p, answer in pairs])


def _number_sampled(requests: Sequence[Request]) -> list[Request]:
    """Number equal requests for sampled answers, so that their answers can differ."""
    counts: Counter[tuple[str, int]] = Counter()
    numbered = []
    for request in requests:
        where = (request.task, request.doc_id)
        if isinstance(request.wanted, Generation) and request.wanted.sampled:
            numbered.append(replace(request, repeat=counts[where]))
            counts[where] += 1
        else:
            numbered.append(request)
    return numbered
