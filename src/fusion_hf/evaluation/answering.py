"""Answers requests by a model, each question once, and failures by name."""

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
    """A request without an answer."""

    task: str
    doc_id: int
    reason: str

    def __str__(self) -> str:
        return f"{self.task}, question {self.doc_id}: {self.reason}"


class Outcome(NamedTuple):
    """What became of prompts: an answer to each, or why there is none."""

    prompts: list[EvaluationPrompt]
    answers: list[Answer] | None
    reason: str = ""


class Model(Protocol):
    """
    Who answers prompts: a model in this process, or a server.

    Attributes:
        reader: makes its prompts.
        batch_size: prompts that it answers together.
        window: requests whose images are open at a time.
        device: for lmms-eval, where to put what processes tell each other.
    """

    reader: RequestReader
    batch_size: int
    window: int
    device: torch.device

    def describe(self) -> ModelRecord:
        """Describe the model for a run's record."""

    def answer(self, prompts: Sequence[EvaluationPrompt]) -> Iterator[Outcome]:
        """
        Say what became of prompts, part by part, in any order.

        Raises:
            EndpointUnavailable: if nothing further will be answered.
        """


class RequestAnswerer:
    """
    Answers requests by a model.

    Args:
        model: who answers.
        cache: keeps answers on disk; None: in memory, for as long as this lives.
        progress: whether to show a bar, if there is a terminal.
    """

    def __init__(self, model: Model, cache: AnswerCache | None = None, progress: bool = True):
        self.model = model
        self.cache = cache
        self.progress = progress
        self.failures: list[Failure] = []
        self.prompts: dict[tuple[str, int], list[AskedQuestion]] = {}  # by task and question
        self.asked = 0  # prompts that the model has answered, or could not
        self._is_over = False  # nothing further will be answered
        self._memory: dict[str, Answer] = {}

    def answer(self, requests: Sequence[Request]) -> list[Answer | None]:
        """Answer requests in their order, None for those that failed, which `failures` then names."""
        answers: list[Answer | None] = []
        numbered = _number_sampled(requests)
        self._is_over = False
        terminal = sys.__stderr__  # whatever a caller silences
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
        """Ask prompts, given by key, and keep the answers; returns reasons for those that have none, by key."""
        failed: dict[str, str] = {}
        try:
            for outcome in self.model.answer(list(new.values())):
                self.asked += len(outcome.prompts)
                if outcome.answers is None:
                    failed.update({prompt.key: outcome.reason for prompt in outcome.prompts})
                else:
                    self._keep(outcome.prompts, outcome.answers)
        except EndpointUnavailable as error:  # one failure says it; thousands that were not asked would hide it
            self._is_over = True
            first = next(key for key, prompt in new.items() if key not in failed and self._known(prompt) is None)
            failed[first] = f"{error}; no further question was asked"
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
    """Repeated requests for sampled answers get different numbers, so that their answers may differ."""
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
