"""Each filter on texts as language models write them: what it must reject, with its reason, and what it must keep."""

from pathlib import Path

import pytest
from tests.synthesis.runs import letter_shares

from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import make_dataclass
from fusion_hf.synthesis.category import FOLDER, ModelCheck, load_categories
from fusion_hf.synthesis.choices import Choice, parse_choice
from fusion_hf.synthesis.filters import RULES, build_filters, first_problem
from fusion_hf.synthesis.filters.options import OptionsBalance
from fusion_hf.synthesis.filters.text import DuplicateQuestionsFilter
from fusion_hf.synthesis.rollouts import fill_rubric, parse_verdict, verdict_problem
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

SCENE = (
    "Three red apples and a green pear lie on a white plate. Two dogs, one brown and one black, sit left of the dark "
    "blue sofa. The wooden door is painted light green; the wall is gray. A black-and-white cat sleeps. The sign says "
    "“OPEN 24 HOURS” in orange letters, and a label says 'No. 7'. Twenty-one birds fly, and a pair of shoes stands on "
    "the floor. No people are there."
)


def record(*turns: tuple[str, str], descriptions: tuple[str, ...] = (SCENE,), **fields) -> SynthRecord:
    values = {"id": "1", "category": "SynthColor", "caption": "a room", "seed": 0, **fields}
    return SynthRecord(**values, descriptions=descriptions, turns=tuple(RecordTurn(*turn) for turn in turns))


def check(name: str, subject: SynthRecord, **settings) -> str | None:
    return make_dataclass(RULES[name], settings, "test").check(subject)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("How many apples are there?", "3", None),
        ("How many apples are there?", "Three.", None),
        ("How many red apples lie on the plate?", "There are three red apples on the plate.", None),
        ("How many apples are there?", "Two", "2 apple"),
        ("How many apples are there?", "The picture shows 21 apples", "21 apple"),
        ("How many dogs are brown?", "One of the two dogs is brown.", None),
        ("How many pears are there?", "One", None),
        ("How many birds are in the sky?", "21", None),
        ("How many shoes can you see?", "Two", None),
        ("How many pieces of fruit are there in total?", "Four", None),
        ("How many people are there?", "None", None),
        ("How many dogs are there?", "No dogs", "0 dog"),
        ("Are there four apples?", "No, there are three.", None),
        ("Are there four apples?", "Yes", "4 apple"),
        ("What is there?", "Five apples and two dogs.", "5 apple"),
        ("Which dog barks?", "The brown one", None),
        ("What does the sign say?", '"OPEN 12 HOURS"', None),  # is for `written`
        ("Why?", "1. It is late.\n2. The lamp is on.\nAnswer: night", None),
        ("What is on the plate?\nA. three apples\nB. five apples\nC. seven apples", "B. five apples", "5 apple"),
    ],
)
def test_counts(question, answer, reason):
    found = check("counts", record((question, answer)))
    assert found == (f"turn 1: the description does not contain {reason}" if reason else None)


PAIR = ("Two red balls and a dog.", "Three blue balls and a dog.")


@pytest.mark.parametrize(
    ("question", "answer", "kept"),
    [
        ("How many balls are in the left picture?", "2", True),
        ("How many balls are in the left picture?", "3", False),
        ("How many balls are in the right image?", "3", True),
        ("What color are the balls in the right picture?", "Red", False),
        ("What color are the balls in the right picture?", "Blue", True),
        ("What differs?", "The left picture has two red balls, the right one three blue balls.", True),
        ("What differs?", "There are five red balls.", False),
    ],
)
def test_sides_of_a_pair(question, answer, kept):
    subject = record((question, answer), descriptions=PAIR)
    assert all(check(name, subject) is None for name in ("counts", "colors")) == kept


@pytest.mark.parametrize(
    ("question", "answer", "kept"),
    [
        ("How many red things are there?", "3", True),
        ("How many red things are there?", "7", False),
        ("How many balls and cups are there?", "Six", True),
        ("How many balls and hats are there?", "9", False),
    ],
)
def test_counts_of_several_things(question, answer, kept):
    text = "There are seven things: two red balls, one red cup, three blue balls and one hat."
    subject = record((question, answer), descriptions=(text,))
    assert (check("counts", subject) is None) == kept


def test_both_images_are_those_of_the_pair():
    pair = ("A red ball.", "A blue ball.")
    question = "Do both pictures have the same number of balls?"
    assert check("counts", record((question, "Yes"), descriptions=pair)) is None
    assert check("counts", record(("Do both pictures show three balls?", "Yes"), descriptions=pair)) is not None
    assert check("counts", record((question, "Yes"), descriptions=pair[:1])) is not None


def test_no_is_no_color():
    text = "Two green cars stand there. There are no red or dark blue cars and no yellow bikes."
    for color, kept in (("Green", True), ("Red", False), ("Blue", False), ("Yellow", False)):
        subject = record(("What color are the cars?", color), descriptions=(text,))
        assert (check("colors", subject) is None) == kept, color
    assert check("colors", record(("What is there?", "There are no red cars."), descriptions=(text,))) is None
    assert check("colors", record(("Is it green?", "No, red."), descriptions=(text,))) is not None


def test_derived_counts():
    turn = ("How many birds are there for each apple?", "There are 7 of them")
    assert check("counts", record(turn)) is not None
    assert check("counts", record(("How many more birds than apples are there?", "18 more")), derived=True) is None
    assert check("counts", record(("How many more birds than apples are there?", "17 more")), derived=True) is not None


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What color is the plate?", "White", None),
        ("What color is the plate?", "Red.", "red for plate"),
        ("What colour is the sofa?", "Navy", None),
        ("What colour is the sofa?", "Light blue", "blue for sofa"),
        ("What is the color of the door?", "Green", None),
        ("What color is the wall?", "Grey", None),
        ("What color is the cat?", "Black and white", None),
        ("What color are the letters?", "Orange", None),
        ("What color is the man's hat?", "Purple", "purple for man hat"),
        ("Is the door red?", "No, it is green.", None),
        ("Is the door red?", "Yes", "red for door"),
        ("What are they like?", "The apples are red and lie on a white plate.", None),
        ("What are they like?", "The sofa is yellow.", "yellow for sofa"),
        ("What is there?", "Reds and purples", "purples"),
        ("What fruit is there?", "Apples and oranges", None),
        (
            "What is on the plate?\nA. green apples\nB. red apples\nC. blue apples",
            "A. green apples",
            "green for apple",
        ),
    ],
)
def test_colors(question, answer, reason):
    found = check("colors", record((question, answer)))
    assert found == (f"turn 1: the description does not contain {reason}" if reason else None)


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([("What color is the red bus?", "Red")], "turn 1: the question contains the answer 'Red'"),
        ([("What is on the table?", "A table.")], "turn 1: the question contains the answer 'A table.'"),
        ([("How many of the three dogs?", "3")], "turn 1: the question contains the answer '3'"),
        ([("Is the bus red or blue?", "Red")], None),
        ([("Is the bus red?", "Yes")], None),
        ([("Is it day?", "It is day.")], None),
        ([("Where is the dog?", "On the sofa")], None),
        ([("What color is it?\nA. red\nB. blue\nC. pink", "A. red")], None),
        (
            [("What color is the bus?", "Red"), ("Where is the red bus?", "Left")],
            "turn 2: the question contains the answer of turn 1",
        ),
        (
            [("What do the three dogs do?", "Run"), ("How many dogs are there?", "There are 3 dogs.")],
            "turn 1: the question contains the answer of turn 2",
        ),
        ([("What color is the bus?", "Red"), ("Where is the red hat?", "Left")], None),
        ([("How many dogs are there?", "There are no dogs.")], None),
        (
            [("How many dogs are there?", "There are dogs.")],
            "turn 1: the question contains the answer 'There are dogs.'",
        ),
    ],
)
def test_leakage(turns, found):
    assert check("leakage", record(*turns)) == found


def test_leakage_between_can_be_allowed():
    turns = [("What color is the bus?", "Red"), ("Where is the red bus?", "Left")]
    assert check("leakage", record(*turns), between=False) is None


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('It says "OPEN 24 HOURS".', None),
        ("“OPEN”", None),
        ("The label has 'No. 7' on it.", None),
        ('"OPEN 24 HOURS No. 7"', None),
        ('"CLOSED"', "'CLOSED'"),
        ('"Open 24 hours"', "'Open 24 hours'"),
        ("The dog's toy", None),
    ],
)
def test_written(answer, found):
    reason = check("written", record(("What is written?", answer)))
    assert reason == (f"turn 1: the description does not contain the text {found}" if found else None)


def test_written_without_case_or_text():
    assert check("written", record(("What is written?", '"open"')), same_case=False) is None
    bare = record(("What is written?", '"open"'), descriptions=("A wall.",))
    assert check("written", bare) == "the description has no text in quotation marks"


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("A red ball. It lies on grass.", "It lies on the grass! A red ball.", "do not differ"),
        ("Two dogs sit.", "2 dog sit", "do not differ"),
        ("A red ball lies on grass.", "A blue ball lies on grass.", None),
        ("A cat left of a dog.", "A dog left of a cat.", None),
        ("A red ball lies on grass.", "Three ships cross the sea at night.", "0% of their words"),
    ],
)
def test_contrast(first, second, found):
    reason = check("contrast", record(("What differs?", "It"), descriptions=(first, second)))
    assert (reason is None) if found is None else (found in reason)


def test_contrast_of_drawn_images_and_of_one():
    same = {"pictures": [{"count": 1}, {"count": 1}]}
    pair = record(("What?", "It"), descriptions=("A cat.", "A dog."), facts=same)
    assert check("contrast", pair, least_alike=0) == "the pictures do not differ"
    assert "1 descriptions" in check("contrast", record(("What?", "It")))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("The description does not say.", "speaks of a given text"),
        ("As mentioned in the caption, a cat.", "speaks of a given text"),
        ("It is not specified.", "speaks of a given text"),
        ("As an AI language model, I see nothing.", "speaks as a model"),
        ("I'm sorry, but no.", "speaks as a model"),
        ("Sure, a cat.", "speaks to the reader"),
        ("A cat. Let me know if you need more!", "speaks to the reader"),
        ("It cannot be determined.", "does not know"),
        ("N/A", "does not know"),
        ("[insert color]", "has a placeholder"),
        ("...", "has a placeholder"),
        ("- a cat\n- a dog", "has markup"),
        ('{"answer": "a cat"}', "has markup"),
        ("**a cat**", "has markup"),
        ("a <image> of a cat", "has an <image> mark"),
        ('It says "I cannot".', None),
        ('"..."', None),
        ("The price is stated on the sign.", None),
        ("An assistant with a llama, in the context of a fair.", None),
        ("It is wet.\nAnswer: rain", None),
    ],
)
def test_meta(answer, kind):
    reason = check("meta", record(("What is it?", answer)))
    assert (reason is None) if kind is None else (kind in reason)


PERSONAL = {
    "call 030 1234567 now": "telephone",
    "+49 170 1234567": "telephone",
    "(415) 555-2671": "telephone",
    "4111 1111 1111 1111": "card",
    "ann@example.org": "e-mail",
    "GB82 WEST 1234 5698 7654 32": "account",
    "12 Baker Street": "street address",
    "192.168.0.1": "network",
    "52.5200, 13.4050": "coordinates",
    "123-45-6789": "security number",
}
HARMLESS = (
    "555-0142", "room 1234", "in 2019-2020", "12.05.2024", "score 21 - 19", "10:30 - 11:45", "4111 1111 1111 1112",
    "price 1,299.00", "12 000 000", "ISBN 978-3-16-148410-0", "5 green apples", "a street with 7 lamps",
)  # fmt: skip


@pytest.mark.parametrize("text", [*PERSONAL, *HARMLESS])
def test_personal(text):
    for subject in (record(("What?", text)), record(("What?", "It"), descriptions=(text,)), record(caption=text)):
        reason = check("personal", subject)
        assert (PERSONAL[text] in reason) if text in PERSONAL else (reason is None)
        assert reason is None or text not in reason  # the report of rejections must not spread it


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a nude on a sofa", "sexual content"),
        ("he was stabbed", "violence"),
        ("a man covered in blood", "violence"),
        ("two swastikas", "hate"),
        ("self-harm", "self-harm"),
        ("a grape and a dead tree in Essex", None),
        ("a photographer shoots a picture of a skilled player", None),
    ],
)
def test_unsafe(text, kind):
    reason = check("unsafe", record(("What?", text)))
    assert (reason is None) if kind is None else (kind in reason)


def test_unsafe_settings():
    subject = record(("What?", "a nude with a Zebra"))
    assert check("unsafe", subject, kinds=["violence"]) is None
    assert check("unsafe", subject, allowed=["nude"]) is None
    assert "zebra" in check("unsafe", subject, kinds=["hate"], more=["zebra"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Der Hund ist auf dem Bild und nicht rot", "german"),
        ("une voiture rouge est dans la rue avec un chien", "french"),
        ("红色的圆", "not Latin"),
        ("собака", "not Latin"),
        (" ".join(["lorem ipsum dolor sit amet"] * 6), "most frequent"),
        ("A red circle", None),
        ("A café with a piñata.", None),
        ('The sign says "Die Post ist das und der".', None),
    ],
)
def test_language(text, found):
    for subject in (record(("Dog?", text)), record(descriptions=(text,))):
        reason = check("language", subject)
        assert (reason is None) if found is None else (found in reason)
    if found == "german":
        assert check("language", record(descriptions=(text,)), language="german") is None


def test_length():
    settings = {"question": [2, 4], "answer": [1, 2], "description": [1, 80]}
    assert check("length", record(("What is it?", "a cat")), **settings) is None
    long = record(("What is it?", "a black cat"))
    assert check("length", long, **settings) == "turn 1: the answer has 3 words; allowed: 1 to 2"
    assert "the question has 1 words" in check("length", record(("What?", "a cat")), **settings)
    assert "description 1 has" in check("length", record(("What is it?", "cat")), description=[1, 5])


def test_repeated_questions():
    turns = [("What color is the bus?", "Red"), ("Where is it?", "Left"), ("what colour is a bus", "Red")]
    assert check("repeated_questions", record(*turns)) == "turn 3 asks what turn 1 asks"
    assert check("repeated_questions", record(*turns[:2])) is None
    other = [("Which is it?\nA. a cat\nB. a dog", "A"), ("Which is it?\nA. a hat\nB. a bag", "A")]
    assert check("repeated_questions", record(*other)) is None


@pytest.mark.parametrize(
    ("options", "answer", "found"),
    [
        (("red", "blue", "green"), "A. red", None),
        (("red", "blue", "Red."), "A", "are the same"),
        (("two dogs", "2 dogs", "a cat"), "C", "are the same"),
        (("red", "blue", "all of the above"), "A", "speaks of other options"),
        (("red", "blue", "Both A and B"), "A", "speaks of other options"),
        (("red", "", "blue"), "A", "an option is empty"),
        (("red", "blue"), "A", "2 options; allowed: 3 to 4"),
        (("red", "blue", "green"), "E", "the last option is C"),
        (("red", "blue", "green"), "B. red", "the answer says 'red'"),
        (("red", "blue", "green"), "pink", "none of the options"),
        (("a very long and careful sentence on what there is", "a cat", "a dog"), "A", "much longer"),
        (("both sides", "the left side", "the right side"), "A", None),
    ],
)
def test_options(options, answer, found):
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    reason = check("options", record(("\n".join(["Which?", *lines]), answer)), least=3, most=4)
    assert (reason is None) if found is None else (found in reason)


def choice_records(count: int, options: int) -> list[SynthRecord]:
    """The first option is always right, as language models like it."""
    texts = tuple(f"thing {index}" for index in range(options))
    turn = Choice("Which?", texts, 0).turn()
    return [record((turn.question, turn.answer), id=str(index)) for index in range(count)]


def test_letters_are_balanced():
    records = [*choice_records(101, 3), *choice_records(203, 4), record(("What color is it?", "Red"))]
    assert letter_shares(records) == {3: {"A": 1, "B": 0, "C": 0}, 4: {"A": 1, "B": 0, "C": 0, "D": 0}}
    balanced = list(map(OptionsBalance(seed=5).balanced, records))
    for options, shares in letter_shares(balanced).items():
        assert all(share == pytest.approx(1 / options, abs=0.03) for share in shares.values()), shares
    assert (
        balanced
        == list(map(OptionsBalance(seed=5).balanced, records))
        != list(map(OptionsBalance(seed=6).balanced, records))
    )
    assert balanced[-1] == records[-1]
    for before, after in zip(records[:-1], balanced[:-1], strict=True):
        first, second = parse_choice(before.turns[0]), parse_choice(after.turns[0])
        assert isinstance(first, Choice) and isinstance(second, Choice)
        assert first.options[first.answer] == second.options[second.answer]
        assert sorted(first.options) == sorted(second.options)


def test_rejected_records_do_not_count_for_the_balance():
    records = choice_records(40, 4)
    rejected = [item.rejected("length", "x") if index % 2 else item for index, item in enumerate(records)]
    balanced = [item for item in map(OptionsBalance().balanced, rejected) if item.rejection is None]
    assert set(letter_shares(balanced)[4].values()) == {0.25}


def test_questions_asked_before():
    rule = DuplicateQuestionsFilter()
    question = ("What color is it?", "Red")
    first, other = (record(question, descriptions=(text,)) for text in ("A bus.", "A cat."))
    assert rule.check(first) is None
    assert rule.check(record(("what colour is it", "red"), descriptions=("a bus",))) is not None
    assert rule.check(other) is None
    assert rule.check(other) == "turn 1: the question was asked about the same scene"


@pytest.mark.parametrize("name", list(load_categories()))
def test_every_category_has_its_filters(name: str):
    category = load_categories()[name]
    names = [rule.name for rule in build_filters(category)]
    assert names[0] == "turns" and set(names[1:]) == set(category.rules)
    assert ("contrast" in names) == (category.pictures == 2)
    assert ("options" in names) == (category.schema == "ChoiceConversation")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "length",
            {"answers": [1, 2]},
            "test: length has the unknown key 'answers'. Did you mean 'answer'. Allowed: question, answer",
        ),
        ("length", {"answer": [3, 2]}, r"answer.*a list.*got \[3, 2\]"),
        ("language", {"language": "klingon"}, "language.*english.*got 'klingon'"),
        ("unsafe", {"kinds": ["fun"]}, r"kinds\[0\].*sexual content.*got 'fun'"),
        ("unsafe", {"more": "word"}, "more.*a list.*got 'word'"),
        ("contrast", {"least_alike": 2}, "least_alike.*a number from 0 to 1.*got 2"),
        ("leakage", {"between": 1}, "between.*true or false.*got 1"),
        ("written", {"same_case": "x"}, "same_case.*true or false.*got 'x'"),
        ("counts", {"derived": 1}, "derived.*true or false.*got 1"),
        ("options", {"least": "three"}, "least.*a whole number.*got 'three'"),
        ("meta", {"x": 1}, "test: meta must have no keys, got 'x'"),
    ],
)
def test_settings_are_checked(name, settings, message):
    with pytest.raises(InputError, match=message):
        make_dataclass(RULES[name], settings, f"test: {name}")


def test_unknown_rule(tmp_path: Path):
    path = tmp_path / "Mine.yaml"
    text = (FOLDER / "SynthColor.yaml").read_text()
    path.write_text(text.replace("  leakage: {}", "  leaks: {}"))
    with pytest.raises(InputError, match=r"Mine: `rules` must contain only filters from .*length.*got 'leaks'"):
        build_filters(load_categories(tmp_path)["Mine"])


def test_the_first_reason_counts():
    filters = [make_dataclass(RULES[name], {}, "test") for name in RULES if name in ("meta", "colors")]
    bad = record(("What color is the plate?", "Sure, purple"))
    rejected = first_problem(bad, filters)
    assert rejected.rejection is not None and rejected.rejection.step == "meta"
    assert first_problem(rejected, filters) is rejected
    good = record(("What color is the plate?", "White"))
    assert first_problem(good, filters) is good


def test_turns_of_a_category():
    (rule, *_) = build_filters(load_categories()["SynthReasoning"])
    assert rule.check(record(("Why?", "So"))) is None
    assert rule.check(record()) == "it has 0 turns; allowed: 1 to 1"
    assert rule.check(record(("Why?", " "))) == "a text is empty"
    assert "2 descriptions" in rule.check(record(("Why?", "So"), descriptions=("a", "b")))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"score": 4, "reason": "fine"}', 4),
        ('```json\n{"score": "5", "reason": "ok"}\n```', 5),
        ("Score: 3. One answer is vague.", 3),
        ("I give it 2/5.", 2),
        ("4 out of 5", 4),
        (" 5 ", 5),
        ('{"score": 9}', None),
        ('{"score": true}', None),
        ('{"rating": 4}', None),
        ("Both of the 3 turns are fine.", None),
        ("", None),
    ],
)
def test_verdicts(answer, score):
    verdict = parse_verdict(answer)
    assert (verdict.score if verdict is not None else None) == score


def test_judges():
    rubric = ModelCheck("$description | $conversation", 3)
    subject = record(("What color is the hat?", "Red"), descriptions=("A hat for $5.",))
    assert fill_rubric(rubric, subject) == "A hat for $5. | Question: What color is the hat?\nAnswer: Red"
    assert verdict_problem(rubric, '{"score": 4, "reason": "good"}') is None
    assert verdict_problem(rubric, '{"score": 2, "reason": "wrong hat"}') == "score 2; allowed: 3 or more (wrong hat)"
    assert verdict_problem(rubric, "Hm.") == "the answer has no score: 'Hm.'"


def test_a_judge_sees_which_image_is_which():
    pair = record(("What differs?", "It"), descriptions=("A cat.", "A dog."))
    prompt = fill_rubric(ModelCheck("$description$conversation", 3), pair)
    assert "The left picture: A cat.\nThe right picture: A dog." in prompt
