"""Drawn records call a number a number, and no answer can be guessed from the form of its question."""

import re
from collections import Counter, defaultdict
from functools import cache

import pytest

from fusion_hf.drawing.drawn_images import MAX_COUNT
from fusion_hf.synthesis.balance import MOST_ANSWERS, MOST_FORMS, OTHER, answer_value, count_answers, question_form
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.choices import Choice, parse_choice
from fusion_hf.synthesis.procedural.drawn_records import plan
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

NAMES = list(load_categories())
DRAWN = 400  # records of a category
LEAST_ASKED = 100  # answers of a form, before shares say something
FARTHEST = 4  # standard deviations of a share from an even one
YES_NO = {"yes", "no"}
SENTENCE = re.compile(r"\b(is|are|says|has|have|shows|differs?)\b|, ")


@cache
def records(name: str) -> list[SynthRecord]:
    return [plan(name, 0, index).record for index in range(DRAWN)]


def turns_of(*names: str) -> list[RecordTurn]:
    return [turn for name in names for record in records(name) for turn in record.turns]


def form_of(turn: RecordTurn) -> str:
    """Of the question without its options."""
    choice = parse_choice(turn)
    return question_form(choice.stem if isinstance(choice, Choice) else turn.question)


def answers(names: list[str]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for turn in turns_of(*names):
        found[form_of(turn)][answer_value(turn)] += 1
    return found


def farthest(counts: Counter[str], values: int) -> float:
    """Of all shares from an even one, in standard deviations of what chance does."""
    total, share = counts.total(), 1 / values
    return max(abs(count - total * share) for count in counts.values()) / (total * share * (1 - share)) ** 0.5


def test_yes_is_as_frequent_as_no():
    seen = set()
    for form, counts in answers(NAMES).items():
        if not set(counts) <= YES_NO or counts.total() < LEAST_ASKED:
            continue
        seen.add(form)
        assert set(counts) == YES_NO and farthest(counts, 2) < FARTHEST, (form, counts)
    assert seen == {"does picture say", "is there", "do ... pictures"}


@pytest.mark.parametrize("name", ["SynthCount", "SynthConvShort", "SynthMultiChoice", "SynthReasoning"])
def test_all_numbers_are_as_frequent(name: str):
    counts = answers([name])["how many"]
    assert set(counts) == {str(number) for number in range(MAX_COUNT + 1)}
    assert counts.total() >= LEAST_ASKED and farthest(counts, MAX_COUNT + 1) < FARTHEST, counts


def test_no_number_of_shapes_in_pairs_is_rare():
    counts = answers(["SynthContrastShort"])["how many"]
    shares = {number: counts[number] / counts.total() for number in map(str, range(MAX_COUNT + 1))}
    assert min(shares.values()) > 0.05 and max(shares.values()) < 0.3, shares


def test_words_are_as_frequent_as_numbers():
    counts: Counter[str] = Counter()
    for turn in turns_of("SynthText", "SynthTextQA", "SynthConvShort"):
        if "number or a word" in turn.question:
            counts[re.search("number|word", turn.answer.lower())[0]] += 1
    assert counts.total() >= LEAST_ASKED and farthest(counts, 2) < FARTHEST, counts


def test_all_directions_are_as_frequent():
    counts: Counter[str] = Counter()
    for turn in turns_of("SynthSpatial"):
        if "seen from" in turn.question:
            counts[re.search("left|right|above|below", turn.answer.lower())[0]] += 1
    assert counts.total() >= LEAST_ASKED and farthest(counts, 4) < FARTHEST, counts


def test_each_value_of_an_option_can_be_right():
    """An option of a kind that is never right would be ruled out without the image."""
    right: dict[str, Counter[bool]] = defaultdict(Counter)
    for turn in turns_of("SynthMultiChoice"):
        choice = parse_choice(turn)
        assert isinstance(choice, Choice)
        texts = [option.isdigit() for option in choice.options]
        if re.search("number is|number i|word is|word i|picture say", choice.stem) and "color" not in choice.stem:
            assert len(set(texts)) == 1, turn  # words beside a number would give it away
            continue
        about = "word" if re.search("number|word", choice.stem) else ""
        for index, option in enumerate(choice.options):
            right[f"{question_form(choice.stem).split()[1]} {about} {option}"][index == choice.answer] += 1
    offered = {value: counts for value, counts in right.items() if counts.total() >= 20}
    assert len(offered) > 20 and all(counts[True] for counts in offered.values()), offered


@pytest.mark.parametrize("name", NAMES)
def test_a_number_is_called_a_number(name: str):
    for record in records(name):
        kinds = {"number" if facts["word"]["text"].isdigit() else "word" for facts in words_of(record)}
        texts = [
            record.caption,
            *record.descriptions,
            *(text for t in record.turns for text in (t.question, t.answer)),
        ]
        said = " ".join(texts).replace("a number or a word", "").replace("the same number of", "")
        named = set(re.findall(r"\b(number|word)s?\b", said.lower()))
        assert named <= kinds, (kinds, record)
        if kinds == {"number"}:
            assert not re.search(r"\bletters?\b", said), record


def words_of(record: SynthRecord) -> list[dict]:
    return [facts for facts in record.facts["pictures"] if facts["word"] is not None]


def test_yes_and_no_are_those_of_the_facts():
    asked: Counter[str] = Counter()
    for name in NAMES:
        for record in records(name):
            first, *others = record.facts["pictures"]
            for turn in record.turns:
                if (there := re.fullmatch(r"Is there a (\w+) (\w+)\?", turn.question)) is not None:
                    truth = there.groups() in [(shape["color"], shape["kind"]) for shape in first["shapes"]]
                elif (said := re.fullmatch(r'Does the picture say "(\w+)"\?', turn.question)) is not None:
                    truth = said[1] == first["word"]["text"]
                elif turn.question.startswith("Do both pictures have the same number"):
                    truth = len(first["shapes"]) == len(others[0]["shapes"])
                else:
                    continue
                assert (answer_value(turn) == "yes") == truth, (turn, record.facts)
                asked[question_form(turn.question)] += 1
    assert len(asked) == 3, asked


@pytest.mark.parametrize("name", NAMES)
def test_sentences_end_and_singulars_are_singular(name: str):
    for record in records(name):
        for turn in record.turns:
            if SENTENCE.search(turn.answer) and not isinstance(parse_choice(turn), Choice):
                assert turn.answer.endswith(".") or "\nAnswer: " in turn.answer, turn
            assert not re.search(r"\b(?:one|a) (?:\w+ )?(?:shapes|circles|rectangles|triangles)\b", turn.answer), turn
        for text, facts in zip(record.descriptions, record.facts["pictures"], strict=True):
            assert text.endswith(".") and "  " not in text
            said = re.search(r"(?:above|below) the (shapes?)", text)
            if said is not None and facts["word"] is not None and len(words_of(record)) == 1:
                assert (said[1] == "shapes") == (len(facts["shapes"]) > 1), text
                below = facts["word"]["top"] > min(shape["top"] for shape in facts["shapes"])
                assert ("below the" in text) == below, text


def test_texts_do_not_all_begin_or_end_in_the_same_way():
    for name in NAMES:
        last = Counter(re.split(r"(?<=\.) ", text)[-1] for record in records(name) for text in record.descriptions)
        first = Counter(" ".join(text.split()[:3]) for record in records(name) for text in record.descriptions)
        assert max(last.values()) < last.total() / 3 and max(first.values()) < first.total() / 2, (last, first)
    ends = Counter(re.split(r"(?<=\.) ", turn.answer)[-1] for turn in turns_of("SynthConvLong", "SynthScene"))
    assert max(ends.values()) < ends.total() / 3, ends


def test_circles_are_round():
    shapes = [s for name in NAMES for r in records(name) for facts in r.facts["pictures"] for s in facts["shapes"]]
    circles = [shape for shape in shapes if shape["kind"] == "circle"]
    assert circles and all(shape["width"] == shape["height"] for shape in circles)


@pytest.mark.parametrize(
    ("question", "form"),
    [
        ("Is there a red circle in the image?", "is there"),
        ('Does the picture say "moon"?', "does picture say"),
        ("Is the red circle round?", "is ... circle"),
        ("How many gray shapes are there?", "how many"),
        ("What color is the number?", "what color is"),
    ],
)
def test_forms(question: str, form: str):
    assert question_form(question) == form


@pytest.mark.parametrize(
    ("question", "answer", "value"),
    [
        ("Is there a dog?", "Yes, there is a brown dog.", "yes"),
        ("How many dogs are there?", "There are no dogs.", "0"),
        ("How many dogs are there?", "No dogs", "0"),
        ("How many dogs are left?", "There are five dogs.\nFive minus two is three.\nAnswer: 3", "3"),
        ("How many dogs are there?\nA. Two\nB. Three", "B. Three", "3"),
        ("What color is the dog?", "The dog is brown.", "brown"),
        ("What is written?", 'It says "OPEN".', "open"),
        ("What is there?", "A dog.", "dog"),
        ("What is there?", "The dog is brown.", "(longer)"),
        ("Where is the dog?", "At the top left", "at the top left"),
        ("Where is the dog?", "The dog is at the top left of the house.", "(longer)"),
    ],
)
def test_values(question: str, answer: str, value: str):
    assert answer_value(RecordTurn(question, answer)) == value


def test_counts_of_answers_stay_small():
    """Language models write other forms and other answers in each record."""
    found: dict[str, Counter[str]] = {}
    for form in range(MOST_FORMS * 2):
        for answer in range(MOST_ANSWERS * 2):
            count_answers(found, RecordTurn(f"Why {chr(97 + form % 26) * (1 + form // 26)} so?", f"word{answer}"))
    assert len(found) <= MOST_FORMS + 1 and all(len(counts) <= MOST_ANSWERS + 1 for counts in found.values())
    assert sum(counts.total() for counts in found.values()) == MOST_FORMS * 2 * MOST_ANSWERS * 2
    assert found[OTHER]
