"""What a judge is asked about a record, and what its answer means."""

import json
import re
from string import Template
from typing import NamedTuple

from fusion_hf.synthesis.category import MOST_SCORE, ModelCheck
from fusion_hf.synthesis.synth_record import SynthRecord

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
    """Find the score in a judge's answer: its JSON object, "score: 4", "4/5", or a digit alone; else None."""
    if (found := _JSON.search(answer)) is not None:
        try:
            values = json.loads(found.group())
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            score = values.get("score")
            if isinstance(score, str) and score.strip().isascii() and score.strip().isdigit():
                score = int(score)
            if isinstance(score, (int, float)) and not isinstance(score, bool) and score in range(1, MOST_SCORE + 1):
                return Verdict(int(score), str(values.get("reason", "")))
            return None
    found = _SCORE.search(answer) or _ALONE.fullmatch(answer)
    if found is None:
        return None
    return Verdict(int(next(group for group in found.groups() if group)), answer.strip())


def description_text(record: SynthRecord) -> str:
    """Write the descriptions as a judge reads them: of a pair, which is which."""
    if len(record.descriptions) == 1:
        return record.descriptions[0]
    names = ("The left picture", "The right picture")
    return "\n".join(f"{name}: {text}" for name, text in zip(names, record.descriptions, strict=True))


def fill_rubric(rubric: ModelCheck, record: SynthRecord) -> str:
    """Write the prompt of a rubric about a record."""
    turns = "\n".join(f"Question: {turn.question}\nAnswer: {turn.answer}" for turn in record.turns)
    return Template(rubric.prompt).substitute(description=description_text(record), conversation=turns)


def verdict_problem(rubric: ModelCheck, answer: str) -> str | None:
    """Say why an answer to a rubric rejects the record: its score is too low, or it has none; None if it does not."""
    verdict = parse_verdict(answer)
    if verdict is None:
        return f"the answer has no score: {answer.strip()[:80]!r}"
    if verdict.score < rubric.least_score:
        return f"score {verdict.score}; allowed: {rubric.least_score} or more ({verdict.reason[:200]})"
    return None
