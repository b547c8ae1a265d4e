"""Make sound records that look faulty, which the filters must keep."""

import random
import re
from dataclasses import replace

from filter_faults import (
    COLOR,
    COUNT,
    HOW_MANY,
    QUOTED,
    Case,
    appended,
    asked_by_kind,
    with_turn,
)

from fusion_hf.synthesis.choices import Choice, parse_choice
from fusion_hf.synthesis.filters.words import UNITS
from fusion_hf.synthesis.procedural.turn_writers import sentence_case
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

SYNONYMS = {
    "blue": "navy", "red": "crimson", "gray": "grey", "teal": "turquoise", "black": "jet black", "brown": "brownish",
    "green": "greenish", "yellow": "golden",
}  # fmt: skip
HARMLESS = (
    "Room 1234 is next to it.",
    "It dates from 2019-2020.",
    "It costs 1,299.00.",
    "The score is 21 - 19.",
    "It is open 10:30 - 11:45.",
    "Its number is 555-0142.",
    "The book is ISBN 978-3-16-148410-0.",
    "It was made on 12.05.2024.",
    "It has 12 000 000 dots.",
    "The number is 4111 1111 1111 1112.",
)
SAFE = (
    "A grape lies beside it.",
    "It is a dead end.",
    "A photographer shoots it.",
    "A skilled player is next to it.",
    "It is cut out of paper.",
    "A killer whale would be larger.",
    "It hangs on the wall.",
    "Its glass is stained.",
)
NEAR_META = (
    "Its price is stated on the sign.",
    "An assistant with a llama is near it.",
    "In the context of a fair, it is small.",
    'The sign says "I cannot".',
    "Of course it is flat.",
    "The text on it is large.",
    "It is 3 * 2 dots wide.",
)
QUOTES_OF_SIGNS = (
    'A sign says "Die Post ist das und der".',
    'It says "rue de la paix et du port".',
    "A café and a piñata are near.",
    'It says "出口" beside it.',
)


def _as_is(record: SynthRecord, rng: random.Random) -> SynthRecord:
    return record


def _number_words(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Write digits as words in a sentence."""
    turns = tuple(
        replace(turn, answer=f"There are {UNITS[int(turn.answer)]} of them.")
        if HOW_MANY.search(turn.question) and turn.answer.isdigit() and turn.answer != "1"
        else turn
        for turn in record.turns
    )
    return replace(record, turns=turns) if turns != record.turns else None


def _denied_count(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use a wrong number that the answer denies."""
    places = [index for index, turn in enumerate(record.turns) if HOW_MANY.match(turn.question)]
    places = [index for index in places if COUNT.fullmatch(record.turns[index].answer)]
    if not places:
        return None
    index = rng.choice(places)
    turn = record.turns[index]
    question = re.sub("how many", "Are there nine", turn.question, flags=re.IGNORECASE).replace(" are there?", "?")
    return with_turn(record, index, RecordTurn(question, f"No, there are not nine but {turn.answer}."))


def _total(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use a sum that no sentence gives: that of two kinds of shapes in the first image."""
    shapes = record.facts["pictures"][0]["shapes"]
    kinds = sorted({shape["kind"] for shape in shapes})
    if not kinds:
        return None
    if len(kinds) < 2:
        return with_turn(record, 0, RecordTurn(f"How many {kinds[0]}s can you see?", str(len(shapes))))
    first, second = kinds[:2]
    count = sum(shape["kind"] in (first, second) for shape in shapes)
    return with_turn(record, 0, RecordTurn(f"How many {first}s and {second}s are there together?", str(count)))


def _synonyms(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use other words for the same colours in the answers."""
    turns = tuple(
        replace(turn, answer=COLOR.sub(lambda found: SYNONYMS[found[0].lower()], turn.answer)) for turn in record.turns
    )
    return replace(record, turns=turns) if turns != record.turns else None


def _denied_color(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use a wrong colour that the answer denies."""
    found = asked_by_kind(record, rng)
    if found is None:
        return None
    index, shape = found
    wrong = "pink" if rng.random() < 1 / 2 else "orange"
    question = f"Is the {shape['kind']} {wrong}?"
    return with_turn(record, index, RecordTurn(question, f"No, it is not {wrong}; it is {shape['color']}."))


def _plural_colors(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use colours as nouns."""
    colors = sorted({shape["color"] for shape in record.facts["pictures"][0]["shapes"]})
    if not colors:
        return None
    answer = f"There are {' and '.join(f'{color}s' for color in colors)}."
    return with_turn(record, 0, RecordTurn("Which colors do the shapes have?", answer))


def _either_or(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Answer with one of two things that the question names."""
    found = asked_by_kind(record, rng)
    if found is None:
        return None
    index, shape = found
    question = f"Is the {shape['kind']} {shape['color']} or pink?"
    return with_turn(record, index, RecordTurn(question, sentence_case(shape["color"])))


def _yes(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Repeat a yes/no question in the answer."""
    shapes = record.facts["pictures"][0]["shapes"]
    if not shapes or len(record.turns) != 1:
        return None
    shape = rng.choice(shapes)
    name = f"{shape['color']} {shape['kind']}"
    return with_turn(
        record, 0, RecordTurn(f"Is there a {name} in the picture?", f"Yes, there is a {name} in the picture.")
    )


def _other_quotes(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Use other quotation marks, with a full stop inside."""
    turns = tuple(
        replace(turn, answer=QUOTED.sub(lambda found: f"“{found[1]}.”", turn.answer)) for turn in record.turns
    )
    return replace(record, turns=turns) if turns != record.turns else None


def _turned_pair(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Use the same words in both descriptions in another order: which thing is on the left."""
    texts = ("A red circle is left of a blue triangle.", "A blue triangle is left of a red circle.")
    return replace(record, descriptions=texts, facts={})


def _bare_letters(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Write letters in the ways of language models."""
    turns = []
    for turn in record.turns:
        choice = parse_choice(turn)
        assert isinstance(choice, Choice), "all turns of the category are choices"
        text = choice.options[choice.answer]
        forms = (choice.letter, f"({choice.letter.lower()}) {text}", text, f"The answer is {choice.letter}.")
        turns.append(replace(turn, answer=rng.choice((*forms, f"**{choice.letter}. {text}**"))))
    return replace(record, turns=tuple(turns))


def _other_options(record: SynthRecord, rng: random.Random) -> SynthRecord | None:
    """Ask for something else with the same words and other options."""
    question = "Which of these is in the picture?"
    if len(record.turns) < 2 or not isinstance(parse_choice(record.turns[0]), Choice):
        return None
    first = Choice(question, ("a circle", "a cat", "a dog"), 0).turn()
    return replace(record, turns=(first, Choice(question, ("a word", "a shape", "a ship"), 1).turn()))


def _other_scene(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Ask the same questions about another scene."""
    return replace(record, descriptions=tuple(f"{text} It is evening." for text in record.descriptions))


def _other_caption(record: SynthRecord, rng: random.Random) -> SynthRecord:
    """Use a caption that only shares its first words."""
    return replace(record, caption=" ".join(record.caption.split()[:3]) + " on a wooden table near an open window")


LOOKALIKES = (
    Case("as drawn", "", _as_is),  # of all filters
    Case("numbers as words", "counts", _number_words),
    Case("a denied number", "counts", _denied_count),
    Case("a sum", "counts", _total),
    Case("other words for colours", "colors", _synonyms),
    Case("a denied colour", "colors", _denied_color),
    Case("colours as nouns", "colors", _plural_colors),
    Case("this or that", "leakage", _either_or),
    Case("yes, and the question again", "leakage", _yes),
    Case("other quotation marks", "written", _other_quotes),
    Case("turned round", "contrast", _turned_pair),
    Case("letters in other forms", "options", _bare_letters),
    Case("other options", "repeated_questions", _other_options),
    Case("harmless numbers", "personal", appended(HARMLESS)),
    Case("harmless words", "unsafe", appended(SAFE)),
    Case("close to talk of the writer", "meta", appended(NEAR_META)),
    Case("signs in other languages", "language", appended(QUOTES_OF_SIGNS)),
    Case("the same questions elsewhere", "duplicate_questions", _other_scene),
    Case("the same first words", "near_duplicates", _other_caption),
)
