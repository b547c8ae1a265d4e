"""Questions that were asked before."""

import hashlib
from typing import ClassVar

from fusion_hf.synthesis.choices import plain
from fusion_hf.synthesis.filters.text import question_key
from fusion_hf.synthesis.synth_record import SynthRecord

KEY_BYTES = 8  # of a hash that stands for a text: two of a billion texts agree with a chance of 3 %


def text_key(*texts: str) -> bytes:
    """Hash texts to a few bytes."""
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class DuplicateQuestionsFilter:
    """
    Rejects a record that asks what was asked before about the same scene.

    Holds a hash of each question, so a task needs memory for its own records. The order of records decides.
    """

    name: ClassVar[str] = "duplicate_questions"

    def __init__(self) -> None:
        self.asked: set[bytes] = set()

    def check(self, record: SynthRecord) -> str | None:
        """Give the reason to reject the record, or None. A kept record counts from now on."""
        scene = plain("\n".join(record.descriptions) or record.caption)
        pairs = [text_key(scene, question_key(turn)) for turn in record.turns]
        for number, pair in enumerate(pairs, 1):
            if pair in self.asked:
                return f"turn {number}: the question was asked about the same scene"
        self.asked.update(pairs)
        return None
