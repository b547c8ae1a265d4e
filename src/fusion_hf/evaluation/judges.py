"""Detect judges that do not answer. lmms-eval counts their questions as wrong and reports it in its log only."""

import logging
import os
import re
import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from loguru import logger

from fusion_hf.common.endpoint_client import EndpointClient
from fusion_hf.common.endpoints import CHAT, EndpointUnavailable, RequestRejected
from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.benchmarks import API_TYPE, OPENAI, BenchmarkJudge
from fusion_hf.evaluation.processes import environment

URL = "OPENAI_API_URL"
PUBLIC_URL = "https://api.openai.com/v1"
COMPLETIONS = f"/{CHAT}"
KEY_VARIABLE = "OPENAI_API_KEY"
PROBE_SECONDS = 60.0
# messages below the level of errors that precede a question counted as wrong, or a guess
GIVEN_UP = re.compile(
    r"API failed to answer|failed to get a score|when extracting response|Error in llava_aggregation"
)


class JudgeFailed(RuntimeError):
    """A judge or its server did not answer."""


def check_judge(judge: BenchmarkJudge) -> None:
    """
    Send a short question to the judge before any question of the benchmark is answered.

    Args:
        judge: the judge.

    Raises:
        InputError: if environment variables of the judge are missing.
        JudgeFailed: if an OpenAI-compatible server does not answer.
    """
    lacking = judge.lacks(os.environ)
    if lacking:
        raise InputError(f"The judge {judge.asked(os.environ)} is not configured: {'; '.join(lacking)}.")
    if os.environ.get(API_TYPE, OPENAI) == OPENAI:
        _ask_for_a_word(judge.asked(os.environ), _base_url() + COMPLETIONS)


def _ask_for_a_word(model: str, url: str) -> None:
    question = {"model": model, "messages": [{"role": "user", "content": "Answer with the word yes."}]}
    try:
        EndpointClient(KEY_VARIABLE, PROBE_SECONDS, tries=1).ask(url, question)["choices"][0]["message"]["content"]
    except (RequestRejected, EndpointUnavailable, LookupError, TypeError) as error:
        raise JudgeFailed(f"The judge {model} at {url} does not answer: {error}") from error


def _base_url() -> str:
    """Return the address before `/chat/completions`. Raise an InputError if it is not an http or https address."""
    given = os.environ.get(URL, PUBLIC_URL)
    if not given.startswith(("http://", "https://")):
        raise InputError(f"{URL} must be an address with http:// or https://, got {given!r}.")
    return given.rstrip("/").removesuffix(COMPLETIONS)


def address_of(judge: BenchmarkJudge | None) -> AbstractContextManager[None]:
    """
    Set the address to the form that the task reads, while the context is active. Some tasks read it when they are
    imported.

    Args:
        judge: the judge of the benchmark, or None.
    """
    if judge is None or URL not in os.environ:
        return nullcontext()
    return environment({URL: _base_url() + (COMPLETIONS if judge.takes_endpoint else "")})


class JudgeWatch(logging.Handler):
    """
    Watch the logs of lmms-eval while a task is scored.

    Raises:
        JudgeFailed: on exit, if a judge has not answered.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.complaints: list[str] = []
        self._guard = threading.Lock()  # scoring runs in several threads

    def __enter__(self) -> "JudgeWatch":
        self._sink = logger.add(self._hear, level="INFO", format="{message}")
        logging.getLogger("lmms_eval").addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        logger.remove(self._sink)
        logging.getLogger("lmms_eval").removeHandler(self)
        if error is None and self.complaints:
            raise JudgeFailed(f"Scoring reported {len(self.complaints)} errors. The first one: {self.complaints[0]}")

    def _hear(self, message: Any) -> None:
        record = message.record
        if record["level"].no >= logging.ERROR or GIVEN_UP.search(record["message"]):
            self._add(record["message"])

    def emit(self, record: logging.LogRecord) -> None:
        self._add(record.getMessage())

    def _add(self, text: str) -> None:
        with self._guard:
            self.complaints.append(text)
