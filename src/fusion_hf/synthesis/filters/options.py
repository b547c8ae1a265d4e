"""Check the options of multiple-choice questions, and balance which letters are right."""

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
    Require that options are distinct and of similar length, and that the answer names one of them by its letter.

    Args:
        least: the minimum number of options.
        most: the maximum number of options.
        longest: the maximum length of the right option, as a multiple of the mean length of the others. A few extra
            characters are always allowed.
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
    """Return a text that is equal for "two dogs", "2 dogs." and "The two dogs"."""
    return " ".join(content(option)) or plain(option)


class OptionsBalance:
    """
    Reorder the options of all choices, so that all letters are right equally often.

    Out of k questions with k options each, each letter is right once, in an order that the seed determines. Among
    questions with the same number of options, the counts of two letters never differ by more than one. Wrong options
    are shuffled. The result depends only on the records and their order.

    Args:
        seed: the seed of the order.
    """

    def __init__(self, seed: int = 0):
        self.places: defaultdict[int, list[int]] = defaultdict(
            list
        )  # by number of options, the letters that are right next
        self.rng = random.Random(f"options/{seed}")

    def balanced(self, record: SynthRecord) -> SynthRecord:
        """
        Reorder the options of a record. A rejected record or one without choices is returned unchanged.

        Args:
            record: the record.
        """
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
