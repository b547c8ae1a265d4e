"""Questions that were asked before."""

import hashlib
from collections import Counter
from typing import ClassVar

from fusion_hf.synthesis.choices import plain
from fusion_hf.synthesis.filters.text import question_key
from fusion_hf.synthesis.record import SynthRecord

KEY_BYTES = 8  # of a hash that stands for a text: two of a billion texts agree with a chance of 3 %


def text_key(*texts: str) -> bytes:
    """A hash of a few bytes."""
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class DuplicateQuestions:
    """
    Rejects a record that asks what was asked before: a question about the same scene, or one that was asked too often.

    Holds a hash of each question, so a task needs memory for its own records. The order of records decides.

    Args:
        most: records that may have the same question, about different scenes; None is any number.
    """

    name: ClassVar[str] = "duplicate_questions"

    def __init__(self, most: int | None = None):
        if most is not None and (isinstance(most, bool) or most < 1):
            raise ValueError(f"most is {most}; allowed: a whole number from 1, or None")
        self.most = most
        self.asked: set[bytes] = set()
        self.counts: Counter[bytes] = Counter()

    def check(self, record: SynthRecord) -> str | None:
        """A kept record counts from now on; a rejected one does not."""
        questions = [question_key(turn) for turn in record.turns]
        scene = plain("\n".join(record.descriptions) or record.caption)
        pairs = [text_key(scene, question) for question in questions]
        for index, pair in enumerate(pairs):
            if pair in self.asked:
                return f"turn {index + 1}: the question was asked about the same scene"
        keys = {text_key(question) for question in questions} if self.most is not None else set()
        if any(self.counts[key] >= self.most for key in keys if self.most is not None):
            return f"a question was asked in {self.most} records"
        self.asked.update(pairs)
        self.counts.update(keys)
        return None
