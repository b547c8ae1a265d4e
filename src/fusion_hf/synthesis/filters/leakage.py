"""Reject questions that contain their own answer or that of another question."""

import re
from dataclasses import dataclass
from typing import ClassVar

from fusion_hf.synthesis.choices import plain_turn
from fusion_hf.synthesis.filters.mentions import asked_color, asked_counts
from fusion_hf.synthesis.filters.words import color_of, content, tokens
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

YES_NO = frozenset({"yes", "no", "true", "false"})
VERBS_FIRST = frozenset(  # first words of yes/no questions
    "is are was were do does did has have had can could will would should may might isn't aren't doesn't don't".split()
)
_SIDE = re.compile(
    r"\b(?:left|right) (?:picture|image)\b", re.IGNORECASE
)  # sides of a pair, which do not answer "where?"
MOST_WORDS = 4  # maximum length of an answer that another question can reveal


@dataclass(frozen=True)
class LeakageFilter:
    """
    Require that an answer says something that its question does not contain, except for yes/no and either/or
    questions.

    Args:
        between: whether a question may also not contain the colour or number of the same thing that another question
            asks for. FUSION's vision tower reads all questions of a conversation.
    """

    name: ClassVar[str] = "leakage"
    between: bool = True

    def check(self, record: SynthRecord) -> str | None:
        turns = [plain_turn(turn) for turn in record.turns]
        for number, turn in enumerate(turns, 1):
            if _contains_answer(turn):
                return f"turn {number}: the question contains the answer {turn.answer[:40]!r}"
            if not self.between:
                continue
            for other, second in enumerate(turns, 1):
                if other != number and _gives_away(second.question, turn):
                    return f"turn {other}: the question contains the answer of turn {number}"
        return None


def _contains_answer(turn: RecordTurn) -> bool:
    question = _SIDE.sub("picture", turn.question)
    parts = tokens(question)
    if not parts or parts[0] in VERBS_FIRST or "or" in parts:
        return False
    answer = content(turn.answer)
    if not answer or (tokens(turn.answer)[0] in YES_NO and set(parts) & VERBS_FIRST):
        return False
    if asked_counts(question) and "no" in tokens(turn.answer):  # "there are no dogs" means zero
        return False
    return set(answer) <= set(content(question))


def _gives_away(question: str, turn: RecordTurn) -> bool:
    """
    Return whether a question names the answer directly before the thing whose colour or number the turn asks
    for.
    """
    color, counts = asked_color(turn.question), asked_counts(turn.question)
    answer = content(turn.answer)
    thing = color or (counts[0] if counts else ())
    if not thing or not 0 < len(answer) <= MOST_WORDS:
        return False
    found = [word for word in answer if (color_of(word) if color else word[0].isdigit())]
    words = content(question)
    for place, word in enumerate(words):
        # allows two words in between: "the red fire truck", "three small dogs"
        if word == thing[-1] and found and set(found) <= set(words[max(0, place - 2 - len(found)) : place]):
            return words != content(turn.question)
    return False
