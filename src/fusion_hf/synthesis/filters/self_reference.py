"""Reject answers about the writer or its material instead of the image."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fusion_hf.data.record_parsing import IMAGE_TOKEN
from fusion_hf.synthesis.filters.mentions import unquoted
from fusion_hf.synthesis.synth_record import SynthRecord

_TEXT = r"(?:description|caption|passage|prompt|context(?! of)|paragraph|(?:given|provided) (?:text|information))"
MARKUP = "has markup"
_WHICH = r"(?:the|this|your)\s+(?:(?:given|provided|above|scene|image|picture|original|detailed)\s+)*"
_SAYS = r"(?:says?|states?|mentions?|describes?|tells?|does|doesn't|indicates?|specifies|provided|given|above|you \w+)"
PHRASES: dict[str, tuple[str, ...]] = {
    "speaks of a given text": (
        rf"\b{_WHICH}{_TEXT}\s+{_SAYS}\b",
        rf"\b(?:according to|based on|(?:stated|mentioned|described|given|specified) in|in|from)\s+{_WHICH}{_TEXT}\b",
        r"\b(?:is|are|was|were)\s+(?:not\s+)?(?:mentioned|described|specified|stated)\b(?!\s+(?:on|by|above|below))",
    ),
    "speaks as a model": (
        r"\bas an? (?:ai|(?:large )?language model)\b",
        r"\bi(?: am|'m) (?:an? ai|an? (?:large )?language model|sorry)\b",
        r"\bi (?:cannot|can't|am unable to|do not have|don't have|could not|apologi[sz]e)\b",
        r"\bmy (?:training data|knowledge cutoff)\b",
        r"\b(?:openai|chatgpt)\b",
    ),
    "speaks to the reader": (
        r"\A\s*(?:sure|certainly|of course|absolutely|great question)[,!.]",
        r"\bhere(?: is|'s| are) (?:the|your|a|some|another) (?:question|answer|json|conversation|output|response)s?\b",
        r"\b(?:let me know if|feel free to ask|hope this helps|i'd be happy to|is there anything else)\b",
    ),
    "does not know": (
        r"\b(?:cannot|can't|could not|can not|impossible to|not possible to|unable to) (?:be )?"
        r"(?:determined?|known?|tell|say|inferred?|answer(?:ed)?)\b",
        r"\bnot (?:enough|sufficient) information\b",
        r"\A\W*(?:unknown|unspecified|n/a|none given)\W*\Z",
    ),
    "has a placeholder": (
        r"\[(?:insert|your|object|colou?r|number|name|answer|question|text)\b[^\]]*\]",
        r"<(?:question|answer|object|colou?r|number|text|description|insert)[^>]*>",
        r"\{\{?\w+\}\}?|\blorem ipsum\b|\A\W*\Z|^\s*q(?:uestion)?\s*\d*\s*:",
        r"\$(?:caption|description|style|first|second)\b",
    ),
    MARKUP: (
        r"```|^#{1,6}\s|^\s*[-*•]\s+\S|\*\*\S|\\n",
        r"</?(?:p|br|div|b|i|s|system|user|assistant)\s*/?>|<\|[^|>]*\|>",
        r"\"\w+\":\s*[\"\[{\d]",
    ),
}
_OF_DESCRIPTIONS = ("speaks as a model", "speaks to the reader", "has a placeholder", MARKUP)
_PATTERNS = {what: re.compile("|".join(parts), re.IGNORECASE | re.MULTILINE) for what, parts in PHRASES.items()}


@dataclass(frozen=True)
class MetaTalkFilter:
    """Reject texts that mention a description or a model, address the reader, or contain placeholders or markup."""

    name: ClassVar[str] = "meta"

    def check(self, record: SynthRecord) -> str | None:
        for number, turn in enumerate(record.turns, 1):
            for name, text in (("question", turn.question), ("answer", turn.answer)):
                if IMAGE_TOKEN in text:
                    return f"turn {number}: the {name} has an {IMAGE_TOKEN} mark"
                if problem := _problem(text):
                    return f"turn {number}: the {name} {problem}"
        for number, text in enumerate(record.descriptions, 1):
            if problem := _problem(text, _OF_DESCRIPTIONS):
                return f"description {number} {problem}"
        return None


def _problem(text: str, kinds: Iterable[str] = _PATTERNS) -> str | None:
    plain = unquoted(text, instead="x")  # text written in the image may be anything
    for what in kinds:
        if found := _PATTERNS[what].search(text if what == MARKUP else plain):
            return f"{what}: {found.group().strip()[:40]!r}"
    return None
