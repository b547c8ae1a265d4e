"""Written text that no description has."""

import unicodedata
from dataclasses import dataclass
from typing import ClassVar

from fusion_hf.synthesis.filters.base import plain_turn, where
from fusion_hf.synthesis.filters.mentions import quoted
from fusion_hf.synthesis.synth_record import SynthRecord

_EDGES = " .,;:!?"


@dataclass(frozen=True)
class WrittenTextFilter:
    """
    What answers have in quotation marks is written in the image, letter by letter.

    Args:
        same_case: capitals have to agree too.
    """

    name: ClassVar[str] = "written"
    same_case: bool = True

    def check(self, record: SynthRecord) -> str | None:
        known = [self._plain(text) for description in record.descriptions for text in quoted(description)]
        if not known:
            return "the description has no text in quotation marks"
        # a text may be given in parts, or several as one
        together = " ".join(known)
        for index, turn in enumerate(record.turns):
            for text in quoted(plain_turn(turn).answer):
                plain = self._plain(text)
                if plain and f" {plain} " not in f" {together} ":
                    return f"{where(index)}: the description does not contain the text {text[:60]!r}"
        return None

    def _plain(self, text: str) -> str:
        normal = " ".join(unicodedata.normalize("NFKC", text).replace("’", "'").split()).strip(_EDGES)
        return normal if self.same_case else normal.lower()
