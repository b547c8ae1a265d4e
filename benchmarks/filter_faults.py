"""Put known faults into drawn records, which the filters must find."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from fusion_hf.drawing.drawn_images import COLORS, SHAPES
from fusion_hf.synthesis.choices import LETTERS, Choice, parse_choice
from fusion_hf.synthesis.filters.words import UNITS
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

Change: TypeAlias = Callable[
    [SynthRecord, random.Random], SynthRecord | None
]  # None if it is not possible with this record

LONG_CAPTION = 10  # minimum number of words, such that one more keeps nine of ten word pairs
WORD_COUNT = 400  # length of a text that is too long for all categories
COLOR = re.compile(rf"\b({'|'.join(COLORS)})\b", re.IGNORECASE)
COUNT = re.compile(rf"\b(\d|{'|'.join(UNITS[1:10])})\b", re.IGNORECASE)
QUOTED = re.compile(r'"(\w+)"')
COUNTED = re.compile(rf"\b({'|'.join(UNITS[2:9])})(?= (\w+ )?(shapes|{'s|'.join(SHAPES)}s)\b)")
DENIAL = re.compile(r"\bno\b", re.IGNORECASE)
HOW_MANY = re.compile("how many", re.IGNORECASE)
META = (
    "The description does not say that.",
    "According to the caption, it is so.",
    "As an AI language model, I cannot see it.",
    "Sure, here is the answer.",
    "It cannot be determined.",
    "[insert answer]",
    "It is not mentioned.",
    "```json\nyes\n```",
    "I'm sorry, but I don't have eyes.",
    "Based on the given text, yes.",
    "N/A",
    "<answer>",
    "**Yes**",
    "- yes\n- no",
)
FOREIGN = (
    "Auf dem Bild ist ein Kreis, und er ist rot und nicht blau.",
    "Il y a un cercle rouge dans la rue, et il est grand.",
    "En el centro hay un círculo, y es de color rojo.",
    "Nel centro della foto ci sono due cerchi, e il primo è rosso.",
    "No centro da imagem há um círculo, e não é azul.",
    "In het midden van de foto zijn er twee cirkels, niet drie.",
    "图片中间有一个红色的圆形。",
    "В центре картинки находится красный круг.",
    "絵の真ん中に赤い丸があります。",
)
PERSONAL = (
    "Call +49 170 1234567.",
    "Call (415) 555-2671.",
    "Write to ann.lee@example.org.",
    "He lives at 12 Baker Street.",
    "The card is 4111 1111 1111 1111.",
    "The account is GB82 WEST 1234 5698 7654 32.",
    "The number is 123-45-6789.",
    "The server is at 192.168.12.40.",
    "It is at 52.52001, 13.40495.",
    "Ring 030 1234567 to order.",
)
UNSAFE = (
    "A nude lies beside it.",
    "A man was stabbed there.",
    "It lies in a pool of blood.",
    "A swastika is next to it.",
    "It is about suicide.",
    "A bag of cocaine is next to it.",
    "A corpse lies beside it.",
    "It is a pipe bomb.",
)


@dataclass(frozen=True)
class Case:
    """A change to drawn records, and the filter that it concerns."""

    name: str
    rule: str
    change: Change


def with_turn(record: SynthRecord, index: int, turn: RecordTurn) -> SynthRecord:
    """Return the record with one turn replaced."""
    return replace(record, turns=(*record.turns[:index], turn, *record.turns[index + 1 :]))


def in_an_answer(record: SynthRecord, rng: random.Random, pattern: re.Pattern[str], value: str) -> SynthRecord | None:
    """Replace the match of a pattern in one of the answers."""
    places = [index for index, turn in enumerate(record.turns) if pattern.search(turn.answer)]
    if not places:
        return None
    index = rng.choice(places)
    turn = record.turns[index]
    return with_turn(record, index, replace(turn, answer=pattern.sub(value, turn.answer, count=1)))


def _absent_color(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use a colour that the image does not have, except in answers that deny it."""
    text = " ".join(record.descriptions)
    if any(DENIAL.search(turn.answer) for turn in record.turns):
        return None
    return in_an_answer(record, rng, COLOR, rng.choice([color for color in COLORS if color not in text]))


def _exchanged_color(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Give the colour of another thing to a shape that is named by its kind."""
    found = asked_by_kind(record, rng)
    if found is None:
        return None
    index, shape = found
    # only for single images, since pairs have no such questions
    others = {other["color"] for other in record.facts["pictures"][0]["shapes"]} - {shape["color"]}
    if not others:
        return None
    turn = record.turns[index]
    return with_turn(record, index, replace(turn, answer=COLOR.sub(rng.choice(sorted(others)), turn.answer, count=1)))


def asked_by_kind(record: SynthRecord, rng: random.Random) -> tuple[int, dict] | None:
    """Return a turn that asks for the colour of a kind of shape, and that shape."""
    found = []
    shapes = record.facts["pictures"][0]["shapes"]
    for index, turn in enumerate(record.turns):
        kind = re.search(rf"color (?:is|of) the ({'|'.join(SHAPES)})\?", turn.question)
        if kind is not None and not isinstance(parse_choice(turn), Choice):
            found.append((index, next(shape for shape in shapes if shape["kind"] == kind[1])))
    return rng.choice(found) if found else None


def _absent_count(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use a number larger than the number of all shapes."""
    return _count(record, rng, [9])


def _absent_count_of(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use such a number in a sentence: "nine red circles"."""
    return in_an_answer(record, rng, COUNTED, UNITS[9])


def _near_count(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use a number that is off by one, which is often the number of something else."""
    return _count(record, rng, None)


def _count(record: SynthRecord, rng: random.Random, values: list[int] | None) -> SynthRecord | None:
    places = [index for index, turn in enumerate(record.turns) if HOW_MANY.search(turn.question)]
    places = [index for index in places if COUNT.fullmatch(record.turns[index].answer)]
    if not places:
        return None
    index = rng.choice(places)
    right = int(record.turns[index].answer)
    wrong = rng.choice(values if values is not None else [count for count in (right - 1, right + 1) if count > 0])
    return with_turn(record, index, replace(record.turns[index], answer=str(wrong)))


def _leaked(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Append the answer to the question."""
    places = [index for index, turn in enumerate(record.turns) if len(turn.answer.split()) == 1]
    places = [index for index in places if record.turns[index].answer not in ("Yes", "No")]
    if not places:
        return None
    index = rng.choice(places)
    turn = record.turns[index]
    return with_turn(record, index, replace(turn, question=f"{turn.question[:-1]}, {turn.answer.lower()}?"))


def _leaked_elsewhere(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Name a shape with its requested colour in another question."""
    found = asked_by_kind(record, rng)
    if found is None or len(record.turns) < 2:
        return None
    index, shape = found
    other = (index + 1) % len(record.turns)
    return with_turn(
        record, other, RecordTurn(f"Where is the {shape['color']} {shape['kind']}?", "On a plain background")
    )


def _misread(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Change one letter of a written text."""
    places = [index for index, turn in enumerate(record.turns) if QUOTED.search(turn.answer)]
    if not places:
        return None
    index = rng.choice(places)
    turn = record.turns[index]
    found = QUOTED.search(turn.answer)
    assert found is not None
    text = found[1]
    place = rng.randrange(len(text))
    alphabet = "0123456789" if text.isdigit() else "abcdefghijklmnopqrstuvwxyz"
    letter = rng.choice(alphabet.replace(text[place], ""))
    wrong = f'"{text[:place]}{letter}{text[place + 1 :]}"'
    return with_turn(record, index, replace(turn, answer=turn.answer.replace(found[0], wrong)))


def _equal_pair(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Repeat the first description with another order, capitals or digits."""
    first = record.descriptions[0]
    sentences = re.split(r"(?<=\.) ", first)
    rng.shuffle(sentences)
    digits = COUNT.sub(lambda found: str(UNITS.index(found[0])) if found[0] in UNITS else found[0], first)
    second = rng.choice((first, " ".join(sentences), first.upper(), digits))
    return replace(record, descriptions=(first, second), facts={})


def _other_pair(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Describe something else in the second description."""
    other = rng.choice(
        (
            "Three ships with white sails cross a stormy sea below dark clouds while gulls fly around the masts.",
            "An old woman sells oranges and bread at a market stall under a striped roof in the morning sun.",
        )
    )
    return replace(record, descriptions=(record.descriptions[0], other), facts={})


def _choice(record: SynthRecord, rng: random.Random) -> tuple[int, Choice]:
    index = rng.randrange(len(record.turns))
    choice = parse_choice(record.turns[index])
    assert isinstance(choice, Choice), "all turns of the category are choices"
    return index, choice


def wrong_option(asked: re.Pattern[str]) -> Change:
    """Call another option right in a question of this kind."""

    def change(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
        choices = [(index, parse_choice(turn)) for index, turn in enumerate(record.turns)]
        found = [(index, c) for index, c in choices if isinstance(c, Choice) and asked.search(c.stem)]
        if not found:
            return None
        index, choice = rng.choice(found)
        others = [number for number in range(len(choice.options)) if number != choice.answer]
        return with_turn(record, index, replace(choice, answer=rng.choice(others)).turn())

    return change


def _same_options(record: SynthRecord, rng: random.Random) -> SynthRecord:
    index, choice = _choice(record, rng)
    twice = choice.options[choice.answer].upper()
    options = tuple(
        twice if n == (choice.answer + 1) % len(choice.options) else o for n, o in enumerate(choice.options)
    )
    return with_turn(record, index, replace(choice, options=options).turn())


def _no_such_letter(record: SynthRecord, rng: random.Random) -> SynthRecord:
    index, choice = _choice(record, rng)
    letter = LETTERS[len(choice.options)]
    return with_turn(record, index, replace(choice.turn(), answer=letter))


def _other_option(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Combine the letter of one option with the text of another."""
    index, choice = _choice(record, rng)
    wrong = choice.options[(choice.answer + 1) % len(choice.options)]
    return with_turn(record, index, replace(choice.turn(), answer=f"{choice.letter}. {wrong}"))


def _all_of_the_above(record: SynthRecord, rng: random.Random) -> SynthRecord:
    index, choice = _choice(record, rng)
    last = rng.choice(("All of the above", "None of these", "Both A and B", "Neither"))
    options = choice.options[:-1] if choice.answer < len(choice.options) - 1 else choice.options[1:]
    answer = options.index(choice.options[choice.answer])
    return with_turn(record, index, Choice(choice.stem, (*options, last), answer).turn())


def _asked_twice(record: SynthRecord, rng: random.Random) -> SynthRecord:
    turn = rng.choice(record.turns)
    question = rng.choice((turn.question, turn.question.lower(), turn.question.replace("the ", "")))
    return replace(record, turns=(*record.turns, replace(turn, question=question)))


def appended(sentences: tuple[str, ...]) -> Change:
    """Append one of the sentences to an answer or the description."""

    def change(record: SynthRecord, rng: random.Random) -> SynthRecord:
        sentence = rng.choice(sentences)
        if rng.random() < 1 / 2:
            first, *rest = record.descriptions
            return replace(record, descriptions=(f"{first} {sentence}", *rest))
        index = rng.randrange(len(record.turns))
        turn = record.turns[index]
        return with_turn(record, index, replace(turn, answer=f"{turn.answer.removesuffix('.')}. {sentence}"))

    return change


def answered(answers: tuple[str, ...]) -> Change:
    """Replace an answer by one of these."""

    def change(record: SynthRecord, rng: random.Random) -> SynthRecord:
        index = rng.randrange(len(record.turns))
        return with_turn(record, index, replace(record.turns[index], answer=rng.choice(answers)))

    return change


def _foreign(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Translate all answers or the description into another language."""
    sentence = rng.choice(FOREIGN)
    if rng.random() < 1 / 2:
        return replace(record, descriptions=(sentence,) * len(record.descriptions))
    return replace(record, turns=tuple(RecordTurn(sentence, sentence) for _ in record.turns))


def _too_long(record: SynthRecord, rng: random.Random) -> SynthRecord:
    text = "It is so. " * WORD_COUNT
    if rng.random() < 1 / 2:
        return replace(record, descriptions=(text,) * len(record.descriptions))
    return answered((text,))(record, rng) or record


def _too_short(record: SynthRecord, rng: random.Random) -> SynthRecord:
    return replace(record, descriptions=("A shape.",) * len(record.descriptions))


def _no_turns(record: SynthRecord, rng: random.Random) -> SynthRecord:
    return replace(record, turns=())


def _many_turns(record: SynthRecord, rng: random.Random) -> SynthRecord:
    return replace(record, turns=tuple(RecordTurn(f"What is thing {number}?", "A shape") for number in range(12)))


def _same_again(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Repeat the same scene and questions with other capitalization."""
    turns = tuple(replace(turn, question=turn.question.upper()) for turn in record.turns)
    return replace(record, turns=turns, descriptions=tuple(text.upper() for text in record.descriptions))


def _near_caption(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Repeat the caption with other capitals and punctuation, and one more word if it is long."""
    more = " again" if len(record.caption.split()) >= LONG_CAPTION else ""
    return replace(record, caption=record.caption.upper().replace(".", "!") + more)


FAULTS = (
    Case("no turns", "turns", _no_turns),
    Case("too many turns", "turns", _many_turns),
    Case("too long", "length", _too_long),
    Case("too short", "length", _too_short),
    Case("another language", "language", _foreign),
    Case("talk of the writer", "meta", answered(META)),
    Case("unsafe", "unsafe", appended(UNSAFE)),
    Case("personal data", "personal", appended(PERSONAL)),
    Case("two options the same", "options", _same_options),
    Case("no such letter", "options", _no_such_letter),
    Case("letter and text differ", "options", _other_option),
    Case("all of the above", "options", _all_of_the_above),
    Case("asked twice", "repeated_questions", _asked_twice),
    Case("answer in its question", "leakage", _leaked),
    Case("answer in another question", "leakage", _leaked_elsewhere),
    Case("equal pair", "contrast", _equal_pair),
    Case("unlike pair", "contrast", _other_pair),
    Case("misread letter", "written", _misread),
    Case("a number that is nowhere", "counts", _absent_count),
    Case("such a number in a sentence", "counts", _absent_count_of),
    Case("one more or less", "counts", _near_count),
    Case("the wrong option of numbers", "counts", wrong_option(HOW_MANY)),
    Case("the wrong option of colours", "colors", wrong_option(re.compile("(what color|color of)", re.IGNORECASE))),
    Case("a colour that is nowhere", "colors", _absent_color),
    Case("another thing's colour", "colors", _exchanged_color),
    Case("asked in another record", "duplicate_questions", _same_again),
    Case("caption with small changes", "near_duplicates", _near_caption),
)
