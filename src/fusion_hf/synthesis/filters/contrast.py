"""Reject pairs of images that are equal, or have too little in common."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fusion_hf.common.yaml_config import allow
from fusion_hf.synthesis.filters.words import content
from fusion_hf.synthesis.synth_record import SynthRecord

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class ContrastFilter:
    """
    Require that two descriptions differ in a meaningful word and share most other words.

    Case, punctuation, articles, singular and plural, digits and number words, and the order of sentences are ignored.
    Images with exact annotations must differ in these.

    Args:
        least_alike: the minimum share of common words, from 0 to 1.
    """

    name: ClassVar[str] = "contrast"
    least_alike: Annotated[float, allow("a number from 0 to 1", lambda value: 0 <= value <= 1)] = 0.5

    def check(self, record: SynthRecord) -> str | None:
        if len(record.descriptions) != 2:
            return f"it has {len(record.descriptions)} descriptions; allowed: two, of pictures that differ"
        first, second = (_sentences(text) for text in record.descriptions)
        if sorted(first) == sorted(second):
            return "the descriptions do not differ"
        drawn = record.facts.get("pictures", ())
        if len(drawn) == 2 and drawn[0] == drawn[1]:
            return "the pictures do not differ"
        left, right = (Counter(" ".join(text).split()) for text in (first, second))
        alike = 2 * (left & right).total() / (left.total() + right.total())
        if alike < self.least_alike:
            return (
                f"the descriptions have {alike:.0%} of their words in common; allowed: {self.least_alike:.0%} or more"
            )
        return None


def _sentences(text: str) -> list[str]:
    return [" ".join(content(sentence)) for sentence in _SENTENCE_END.split(text.strip())]
