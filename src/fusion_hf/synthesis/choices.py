"""Multiple choice as the text of a turn: the question, one line per option, and an answer that starts with a
letter.
"""

import re
from dataclasses import dataclass

from fusion_hf.synthesis.synth_record import RecordTurn

LETTERS = "ABCDEFGH"
_OPTION = re.compile(r"^\s*\(?([A-Ha-h])[.):]\s*(.*?)\s*$")
_ANSWER = re.compile(
    r"^\W*(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|option)\s*(?:is|:)?\s*)?"
    r"[\"'(*]*([A-Ha-h])(?:[\"'*]*[.):]+[\"'*]*\s*|[\"'*]*\s*$)(.*)$",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Choice:
    """
    A multiple-choice question.

    Attributes:
        stem: the question without options.
        options: the options.
        answer: the index of the right option.
        with_text: whether the answer repeats the text of the option.
        rest: what the answer says after the text of the option.
    """

    stem: str
    options: tuple[str, ...]
    answer: int
    with_text: bool = True
    rest: str = ""

    @property
    def letter(self) -> str:
        """Letter of the right option."""
        return LETTERS[self.answer]

    def turn(self) -> RecordTurn:
        """Write the choice as a turn. The answer is "B. a red bus", or "B" without `with_text`."""
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        answer = f"{self.letter}. {self.options[self.answer]}" if self.with_text else self.letter
        return RecordTurn("\n".join([self.stem, *lines]), answer + self.rest)


def split_options(question: str) -> tuple[str, tuple[str, ...]]:
    """
    Split a question into its stem and options.

    Args:
        question: the question.

    Returns:
        The stem and the options. There are none unless the question ends with two or more lines A, B, ...
    """
    lines = question.rstrip().split("\n")
    options: list[str] = []
    while lines and (match := _OPTION.match(lines[-1])):
        options.insert(0, match[2])
        letter = match[1].upper()
        lines.pop()
        if letter == LETTERS[0]:
            return ("\n".join(lines).strip(), tuple(options)) if len(options) > 1 else (question, ())
    return question, ()


def parse_choice(turn: RecordTurn) -> Choice | str:
    """
    Parse the choice of a turn.

    Args:
        turn: the turn.

    Returns:
        The choice, or a text that says why the turn is not one.
    """
    stem, options = split_options(turn.question)
    if not options:
        return "the question has no options A, B, ... one a line"
    if not stem:
        return "there are options, but no question before them"
    text = turn.answer.strip()
    match = _ANSWER.match(text)
    repeated = [number for number, option in enumerate(options) if plain(option) == plain(text)]
    if match is None and len(repeated) != 1:  # an answer without a letter must repeat an option
        return f"the answer {text[:40]!r} is none of the options"
    index = LETTERS.index(match[1].upper()) if match else repeated[0]
    if index >= len(options):
        return f"the answer is {LETTERS[index]}, but the last option is {LETTERS[len(options) - 1]}"
    said = match[2].strip() if match else text
    if not said:
        return Choice(stem, options, index, with_text=False)
    others = [plain(option) for number, option in enumerate(options) if number != index]
    words = plain(options[index]).split()
    if plain(said).split()[: len(words)] != words or (plain(said) in others and plain(said) != plain(options[index])):
        return f"the answer says {said[:40]!r}, but option {LETTERS[index]} is {options[index][:40]!r}"
    rest = said[len(options[index]) :] if said.lower().startswith(options[index].lower()) else ""
    return Choice(stem, options, index, rest=rest if rest.strip(" .") else "")


def plain_turn(turn: RecordTurn) -> RecordTurn:
    """
    Remove options and letters from a turn. Turns that are not multiple choice are returned unchanged.

    Args:
        turn: the turn.
    """
    choice = parse_choice(turn)
    if isinstance(choice, Choice):
        return RecordTurn(choice.stem, choice.options[choice.answer] + choice.rest)
    return turn


def plain(text: str) -> str:
    """
    Convert a text to lower case, without punctuation and repeated spaces.

    Args:
        text: the text.
    """
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
