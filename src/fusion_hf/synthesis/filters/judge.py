"""Models as judges: a language model that reads the record, and a vision-language model that sees its picture."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import ClassVar, NamedTuple, TypeAlias

from fusion_hf.synthesis.category import MOST_SCORE, ModelCheck
from fusion_hf.synthesis.record import SynthRecord

Ask: TypeAlias = Callable[[str, Path | None], str]  # prompt and picture to answer

_JSON = re.compile(r"\{.*\}", re.DOTALL)
_SCORE = re.compile(
    rf"\bscore\b\W*([1-{MOST_SCORE}])(?!\d|\.\d)|\b([1-{MOST_SCORE}])\s*(?:/|out of)\s*{MOST_SCORE}\b", re.I
)
_ALONE = re.compile(rf"\W*([1-{MOST_SCORE}])\W*")


class Verdict(NamedTuple):
    """A score from 1 to 5, and why."""

    score: int
    reason: str


def parse_verdict(answer: str) -> Verdict | None:
    """The score in a judge's answer: its JSON object, "score: 4", "4/5", or a digit alone. None if there is none."""
    if (found := _JSON.search(answer)) is not None:
        try:
            values = json.loads(found.group())
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            score = values.get("score")
            score = (
                int(score) if isinstance(score, str) and score.strip().isascii() and score.strip().isdigit() else score
            )
            if isinstance(score, (int, float)) and not isinstance(score, bool) and score in range(1, MOST_SCORE + 1):
                return Verdict(int(score), str(values.get("reason", "")))
            return None
    found = _SCORE.search(answer) or _ALONE.fullmatch(answer)
    if found is None:
        return None
    return Verdict(int(next(group for group in found.groups() if group)), answer.strip())


def conversation_text(record: SynthRecord) -> str:
    """As a judge reads it."""
    return "\n".join(f"Question: {turn.question}\nAnswer: {turn.answer}" for turn in record.turns)


def description_text(record: SynthRecord) -> str:
    """As a judge reads it: of a pair, which is which."""
    if len(record.descriptions) == 1:
        return record.descriptions[0]
    names = ("The left picture", "The right picture")
    return "\n".join(f"{name}: {text}" for name, text in zip(names, record.descriptions, strict=True))


class Judge:
    """
    Asks for a score of the record, and rejects it if that is too low, or if the answer holds none.

    Args:
        ask: gives the answer to a prompt; its picture is None here.
    """

    name: ClassVar[str] = "judge"

    def __init__(self, ask: Ask, rubric: ModelCheck):
        self.ask, self.rubric = ask, rubric

    def check(self, record: SynthRecord) -> str | None:
        return self._verdict(record, None)

    def prompt(self, record: SynthRecord) -> str:
        """The rubric with the record filled in."""
        texts = {"description": description_text(record), "conversation": conversation_text(record)}
        return Template(self.rubric.prompt).substitute(texts)

    def _verdict(self, record: SynthRecord, picture: Path | None) -> str | None:
        answer = self.ask(self.prompt(record), picture)
        verdict = parse_verdict(answer)
        if verdict is None:
            return f"the answer has no score: {answer.strip()[:80]!r}"
        if verdict.score < self.rubric.least_score:
            return f"score {verdict.score}; allowed: {self.rubric.least_score} or more ({verdict.reason[:200]})"
        return None


class ImageCheck(Judge):
    """
    As `Judge`, with the picture.

    Args:
        ask: sees the picture.
        folder: that the record's file names are relative to.
    """

    name: ClassVar[str] = "image_check"

    def __init__(self, ask: Ask, rubric: ModelCheck, folder: Path):
        super().__init__(ask, rubric)
        self.folder = folder

    def check(self, record: SynthRecord) -> str | None:
        if len(record.images) != 1:
            return f"it has {len(record.images)} pictures; allowed: one, in which a pair is composed"
        return self._verdict(record, self.folder / record.images[0])
