"""Judges that do not answer: lmms-eval scores what they should have judged as wrong, and says so in its log alone."""

import logging
import os
import re
import threading
from types import TracebackType
from typing import Any

from loguru import logger

from fusion_hf.errors import InputError

API_TYPE, OPENAI = "API_TYPE", "openai"
API_KEY = "OPENAI_API_KEY"
# what tasks say below the level of errors before they count a question as wrong, or guess
GIVEN_UP = re.compile(
    r"API failed to answer|failed to get a score|when extracting response|Error in llava_aggregation"
)


class JudgeFailed(RuntimeError):
    """A judge or its server did not answer."""


def check_judge() -> None:
    """
    Raises:
        InputError: if no judge can be asked.
    """
    if os.environ.get(API_TYPE, OPENAI) == OPENAI and not os.environ.get(API_KEY):
        raise InputError(f"A judge is needed, and {API_KEY} is not set; set it, and OPENAI_API_URL for a server.")


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
