"""Judges that do not answer: lmms-eval scores what they should have judged as wrong, and says so in its log alone."""

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
# what tasks say below the level of errors before they count a question as wrong, or guess
GIVEN_UP = re.compile(
    r"API failed to answer|failed to get a score|when extracting response|Error in llava_aggregation"
)


class JudgeFailed(RuntimeError):
    """A judge or its server did not answer."""


def check_judge(judge: BenchmarkJudge) -> None:
    """
    Ask the judge for a word, before any question is answered in vain.

    Raises:
        InputError: if the environment does not say how it is asked.
        JudgeFailed: if a server of OpenAI's protocol gives no answer.
    """
    lacking = judge.lacks(os.environ)
    if lacking:
        raise InputError(f"The judge {judge.asked(os.environ)} cannot be asked: {'; '.join(lacking)}.")
    if os.environ.get(API_TYPE, OPENAI) == OPENAI:
        _ask_for_a_word(judge.asked(os.environ), _base_url() + COMPLETIONS)


def _ask_for_a_word(model: str, url: str) -> None:
    question = {"model": model, "messages": [{"role": "user", "content": "Answer with the word yes."}]}
    try:
        EndpointClient(KEY_VARIABLE, PROBE_SECONDS, tries=1).ask(url, question)["choices"][0]["message"]["content"]
    except (RequestRejected, EndpointUnavailable, LookupError, TypeError) as error:
        raise JudgeFailed(f"The judge {model} at {url} does not answer: {error}") from error


def _base_url() -> str:
    """The address before `/chat/completions`; an InputError for what is no address of the web."""
    given = os.environ.get(URL, PUBLIC_URL)
    if not given.startswith(("http://", "https://")):
        raise InputError(f"{URL} is {given!r}; allowed: an address with http:// or https://.")
    return given.rstrip("/").removesuffix(COMPLETIONS)


def address_of(judge: BenchmarkJudge | None) -> AbstractContextManager[None]:
    """Put the address into the form that a task of lmms-eval reads, of two; some read it when they are imported."""
    if judge is None or URL not in os.environ:
        return nullcontext()
    return environment({URL: _base_url() + (COMPLETIONS if judge.takes_endpoint else "")})


class JudgeWatch(logging.Handler):
    """Listens to lmms-eval's logs while a task is scored.

    Raises:
        JudgeFailed: on leaving, if a judge has not answered.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.complaints: list[str] = []
        self._guard = threading.Lock()  # answers are judged in several threads

    def __enter__(self) -> "JudgeWatch":
        self._sink = logger.add(self._hear, level="INFO", format="{message}")
        logging.getLogger("lmms_eval").addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        logger.remove(self._sink)
        logging.getLogger("lmms_eval").removeHandler(self)
        if error is None and self.complaints:
            raise JudgeFailed(f"{len(self.complaints)} complaints of scoring, the first: {self.complaints[0]}")

    def _hear(self, message: Any) -> None:
        record = message.record
        if record["level"].no >= logging.ERROR or GIVEN_UP.search(record["message"]):
            self._add(record["message"])

    def emit(self, record: logging.LogRecord) -> None:
        self._add(record.getMessage())

    def _add(self, text: str) -> None:
        with self._guard:
            self.complaints.append(text)
