"""Multiple choice: its options, and which letters are right."""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fusion_hf.synthesis.choices import parse_choice, plain
from fusion_hf.synthesis.filters.base import where
from fusion_hf.synthesis.filters.words import content
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

FEW_CHARACTERS = 12
_REFERENCE = re.compile(
    r"\b(all|none|any|both|neither|either|two)\s+(of\s+)?(the\s+)?(above|below|these|those|them|options?|answers?)\b"
    r"|\b(both|neither|either)\s+[a-h]\s+(and|or|nor)\s+[a-h]\b|\boptions?\s+[a-h]\b|^\s*(both|neither|none|all)\W*$",
    re.IGNORECASE,
)


def _several(value: int) -> int:
    if value < 2:
        raise ValueError("a whole number from 2")
    return value


def _factor(value: float) -> float:
    if value < 1:
        raise ValueError("a number from 1")
    return value


@dataclass(frozen=True)
class OptionsFilter:
    """
    Multiple choice: options that are distinct and of a like length, of which one is named by its letter.

    Args:
        least, most: options of a question.
        longest: times the mean length of the other options, that the right one may have; in short options a few
            characters more are allowed always.
    """

    name: ClassVar[str] = "options"
    least: Annotated[int, _several] = 2
    most: Annotated[int, _several] = 6
    longest: Annotated[float, _factor] = 3.0

    def check(self, record: SynthRecord) -> str | None:
        for index, turn in enumerate(record.turns):
            if problem := self._problem(turn):
                return f"{where(index)}: {problem}"
        return None

    def _problem(self, turn: RecordTurn) -> str | None:
        choice = parse_choice(turn)
        if isinstance(choice, str):
            return choice
        if not self.least <= len(choice.options) <= self.most:
            return f"there are {len(choice.options)} options; allowed: {self.least} to {self.most}"
        if not all(option.strip() for option in choice.options):
            return "an option is empty"
        meanings = [_meaning(option) for option in choice.options]
        for number, found in enumerate(meanings):
            if found in meanings[:number]:
                return f"options {choice.options[meanings.index(found)]!r} and {choice.options[number]!r} are the same"
        for option in choice.options:
            if _REFERENCE.search(option):
                return f"option {option!r} speaks of other options"
        others = [len(option) for number, option in enumerate(choice.options) if number != choice.answer]
        if len(choice.options[choice.answer]) > self.longest * sum(others) / len(others) + FEW_CHARACTERS:
            return "the right option is much longer than the others"
        return None


def _meaning(option: str) -> str:
    """Equal for "two dogs", "2 dogs." and "The two dogs"."""
    return " ".join(content(option)) or plain(option)


def balance_options(records: Iterable[SynthRecord], seed: int = 0) -> Iterator[SynthRecord]:
    """
    Put the options of all choices in another order, so that all letters are right equally often.

    Of k questions with k options each letter is right once, in an order drawn by the seed; the counts of two letters
    never differ by more than one among questions of one number of options. Wrong options are shuffled. Records without
    choices, and rejected ones, pass unchanged. The same records in the same order give the same result.
    """
    places: dict[int, list[int]] = {}
    rng = random.Random(f"options/{seed}")
    for record in records:
        if record.rejection is not None:
            yield record
            continue
        turns = tuple(_balanced(turn, places, rng) for turn in record.turns)
        yield replace(record, turns=turns) if turns != record.turns else record


def _balanced(turn: RecordTurn, places: dict[int, list[int]], rng: random.Random) -> RecordTurn:
    choice = parse_choice(turn)
    if isinstance(choice, str):
        return turn
    count = len(choice.options)
    waiting = places.setdefault(count, [])
    if not waiting:
        waiting += rng.sample(range(count), count)
    place = waiting.pop()
    wrong = [option for number, option in enumerate(choice.options) if number != choice.answer]
    rng.shuffle(wrong)
    options = (*wrong[:place], choice.options[choice.answer], *wrong[place:])
    return replace(choice, options=options, answer=place).turn()
