"""Multiple choice: its options, and which letters are right."""

import random
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeAlias

from fusion_hf.common.yaml_config import allow
from fusion_hf.synthesis.choices import parse_choice, plain
from fusion_hf.synthesis.filters.words import content
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

FEW_CHARACTERS = 12
_REFERENCE = re.compile(
    r"\b(all|none|any|both|neither|either|two)\s+(of\s+)?(the\s+)?(above|below|these|those|them|options?|answers?)\b"
    r"|\b(both|neither|either)\s+[a-h]\s+(and|or|nor)\s+[a-h]\b|\boptions?\s+[a-h]\b|^\s*(both|neither|none|all)\W*$",
    re.IGNORECASE,
)


Several: TypeAlias = Annotated[int, allow("a whole number from 2", lambda value: value >= 2)]


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
    least: Several = 2
    most: Several = 6
    longest: Annotated[float, allow("a number from 1", lambda value: value >= 1)] = 3.0

    def check(self, record: SynthRecord) -> str | None:
        for number, turn in enumerate(record.turns, 1):
            if problem := self._problem(turn):
                return f"turn {number}: {problem}"
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


class OptionsBalance:
    """
    Puts the options of all choices in another order, so that all letters are right equally often.

    Of k questions with k options each letter is right once, in an order drawn by the seed; the counts of two letters
    never differ by more than one among questions of one number of options. Wrong options are shuffled. The same
    records in the same order give the same result.
    """

    def __init__(self, seed: int = 0):
        self.places: defaultdict[int, list[int]] = defaultdict(list)  # by number of options, that wait to be right
        self.rng = random.Random(f"options/{seed}")

    def balanced(self, record: SynthRecord) -> SynthRecord:
        """Give the record's choices their order; without choices, or rejected, it stays as it is."""
        if record.rejection is not None:
            return record
        return replace(record, turns=tuple(map(self._balanced_turn, record.turns)))

    def _balanced_turn(self, turn: RecordTurn) -> RecordTurn:
        choice = parse_choice(turn)
        if isinstance(choice, str):
            return turn
        count = len(choice.options)
        waiting = self.places[count]
        if not waiting:
            waiting += self.rng.sample(range(count), count)
        place = waiting.pop()
        wrong = [option for number, option in enumerate(choice.options) if number != choice.answer]
        self.rng.shuffle(wrong)
        options = (*wrong[:place], choice.options[choice.answer], *wrong[place:])
        return replace(choice, options=options, answer=place).turn()
