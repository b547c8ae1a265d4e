"""What a filter is, and what several of them need of a turn."""

from typing import ClassVar, NamedTuple, Protocol

from fusion_hf.synthesis.choices import Choice, parse_choice
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord


class Filter(Protocol):
    """Looks at one record; its settings are the fields of its dataclass."""

    name: ClassVar[str]

    def check(self, record: SynthRecord) -> str | None:
        """Give the reason to reject the record, or None to keep it."""


class PlainTurn(NamedTuple):
    """A question without its options, and what is answered without an option's letter."""

    question: str
    answer: str


def plain_turn(turn: RecordTurn) -> PlainTurn:
    """Take options and letters out of a turn; one that is no multiple choice stays as it is."""
    choice = parse_choice(turn)
    if isinstance(choice, Choice):
        return PlainTurn(choice.stem, choice.options[choice.answer] + choice.rest)
    return PlainTurn(turn.question, turn.answer)


def where(index: int) -> str:
    """Name a turn in a reason."""
    return f"turn {index + 1}"
