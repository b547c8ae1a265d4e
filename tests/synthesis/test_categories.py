"""The twelve categories, what is wrong in a file of one, and the shapes of the writer's answers."""

from math import isclose
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fusion_hf.common.errors import InputError
from fusion_hf.synthesis.category import FOLDER, load_categories, read_category
from fusion_hf.synthesis.choices import Choice, parse_choice, split_options
from fusion_hf.synthesis.schemas import DESCRIBE_SCHEMAS, DescriptionPair, SceneDescription, answer_model
from fusion_hf.synthesis.synth_record import RecordTurn

ALIGNMENT = {"SynthColor", "SynthCount", "SynthSpatial", "SynthScene", "SynthText"}
INSTRUCTION = {
    "SynthMultiChoice",
    "SynthConvShort",
    "SynthConvLong",
    "SynthContrastShort",
    "SynthContrastLong",
    "SynthReasoning",
    "SynthTextQA",
}
STYLES_DRAWN = 2000


@pytest.fixture
def broken_file(tmp_path: Path):
    """Writes SynthColor with changes; a value of None takes a key out."""

    def write(**changes) -> Path:
        values = yaml.safe_load((FOLDER / "SynthColor.yaml").read_text(encoding="utf-8"))
        values.update(changes)
        path = tmp_path / "Mine.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
        return path

    return write


def test_the_twelve():
    categories = load_categories()
    stages = {stage: {c.name for c in categories.values() if c.stage == stage} for stage in ("1", "1.5")}
    assert stages == {"1": ALIGNMENT, "1.5": INSTRUCTION}
    assert {c.name for c in categories.values() if c.pictures == 2} == {"SynthContrastShort", "SynthContrastLong"}
    assert isclose(sum(c.share for c in categories.values()), 1)
    for category in categories.values():
        assert isclose(sum(style.share for style in category.styles), 1), category.name
    assert len({c.prompts_hash for c in categories.values()}) == 12


@pytest.mark.parametrize("name", sorted(ALIGNMENT | INSTRUCTION))
def test_prompts_are_filled_in(name: str):
    category = load_categories()[name]
    assert "a cat for $5" in category.describe("a cat for $5")
    descriptions = tuple(f"costs $caption {i}" for i in range(category.pictures))
    prompt = category.ask(descriptions, seed=0)
    assert all(text in prompt for text in descriptions)  # what is put in is not filled in again
    assert category.style(0).text in prompt
    with pytest.raises(ValueError, match=f"must have {category.pictures} descriptions"):
        category.ask((*descriptions, "one more"), seed=0)


def test_styles_follow_their_shares():
    category = load_categories()["SynthColor"]
    drawn = [category.style(seed) for seed in range(STYLES_DRAWN)]
    assert drawn == [category.style(seed) for seed in range(STYLES_DRAWN)]
    for style in category.styles:
        assert drawn.count(style) / STYLES_DRAWN == pytest.approx(style.share, abs=0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "Mine.yaml has the unknown key 'colour'.*Allowed: stage, .*describe_prompt"),
        ({"share": None}, "Mine.yaml has no share"),
        ({"share": 2}, "share.*a number above 0.*got 2"),
        ({"stage": 1}, "Mine.yaml: .stage.*'1', '1.5'.*got 1"),
        ({"pictures": 3}, "pictures.*1, 2.*got 3"),
        ({"pictures": True}, "pictures.*1, 2.*got True"),
        ({"schema": "Poem"}, "schema.*'Conversation'.*got 'Poem'"),
        ({"turns": [3, 2]}, "turns.*a list of the least and the most.*got \\[3, 2\\]"),
        ({"turns": 3}, "turns.*a list.*got 3"),
        ({"styles": []}, "styles.*a list of mappings with text and share.*got \\[\\]"),
        ({"styles": [{"text": "x", "weight": 1}]}, "styles\\[0\\] has the unknown key 'weight'.*Allowed: text, share"),
        ({"rules": {"length": 5}}, "rules.length.*a mapping of keys to values.*got 5"),
        (
            {"judge": {"prompt": "x", "least_score": 4}},
            "judge.prompt.*the placeholders \\$conversation, \\$description; it has none.*got 'x'",
        ),
        (
            {"describe_prompt": "Say $caption of $name."},
            "describe_prompt.*the placeholders \\$caption; it has \\$caption, \\$name",
        ),
        ({"describe_prompt": "Say $caption for $5."}, "the placeholders \\$caption; it has \\$"),
        ({"pictures": 2}, "`qa_prompt` must have the placeholders \\$first, \\$second, \\$style"),
    ],
)
def test_errors_name_key_and_value(broken_file, changes, message):
    with pytest.raises(InputError, match=message):
        read_category(broken_file(**changes))


def test_no_yaml(tmp_path: Path):
    (tmp_path / "Bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"Bad\.yaml is not valid YAML"):
        read_category(tmp_path / "Bad.yaml")
    with pytest.raises(InputError, match=r"must be a folder with \.yaml files"):
        load_categories(tmp_path / "none")


def test_a_new_category_is_one_file(broken_file):
    path = broken_file(turns=[2, 2])
    category = load_categories(path.parent)["Mine"]
    model = answer_model(category.schema, *category.turns)
    pair = {"question": "What color is the bus?", "answer": "Red"}
    assert model.model_validate({"turns": [pair, pair]}).content() == (RecordTurn(**pair), RecordTurn(**pair))
    for turns in ([pair], [pair] * 3):
        with pytest.raises(ValidationError):
            model.model_validate({"turns": turns})
    assert DESCRIBE_SCHEMAS[category.pictures] is SceneDescription


def test_answers_become_turns():
    reasoned = answer_model("ReasonedAnswer", 1, 1).model_validate(
        {"question": "Will it rain?", "reasoning": ["The sky is dark.", "People open umbrellas."], "answer": "Yes"}
    )
    assert reasoned.content() == (
        RecordTurn("Will it rain?", "The sky is dark.\nPeople open umbrellas.\nAnswer: Yes"),
    )
    choice = answer_model("ChoiceConversation", 1, 3).model_validate(
        {"turns": [{"question": "What is red?", "options": ["a bus", "a cat", "a hat"], "answer": "C"}]}
    )
    assert choice.content() == (RecordTurn("What is red?\nA. a bus\nB. a cat\nC. a hat", "C. a hat"),)
    pair = DescriptionPair(first="A cat.", second="A dog.", difference="The animal.")
    assert pair.content() == ("A cat.", "A dog.")


@pytest.mark.parametrize(
    "answer",
    [
        {"turns": [{"question": "What?", "answer": " "}]},
        {"turns": [{"question": "What?", "answer": "It", "note": "x"}]},
        {"turns": [{"question": "What?"}]},
        {"turns": []},
    ],
)
def test_bad_answers_are_no_answers(answer):
    with pytest.raises(ValidationError):
        answer_model("Conversation", 1, 3).model_validate(answer)


def test_bad_choices_and_pairs():
    for options, answer in ((["a", "b"], "A"), (["a", "b", "c"], "D"), (["a", "b", "c"], "first")):
        with pytest.raises(ValidationError):
            answer_model("ChoiceConversation", 1, 1).model_validate(
                {"turns": [{"question": "What?", "options": options, "answer": answer}]}
            )
    with pytest.raises(ValidationError, match="same text"):
        DescriptionPair(first="A cat.", second="A cat.", difference="None.")


QUESTION = "What is red?\nA. a bus\nB) the hat\n(C) two cats"


@pytest.mark.parametrize(
    ("answer", "letter", "with_text"),
    [
        ("B", "B", False),
        ("b.", "B", False),
        ("(C)", "C", False),
        ("**A**", "A", False),
        ("The answer is B.", "B", False),
        ("B. the hat", "B", True),
        ("Answer: C) two cats", "C", True),
        ("the hat", "B", True),
        ("The hat.", "B", True),
        ('"A": a bus', "A", True),
    ],
)
def test_answers_of_choices(answer, letter, with_text):
    choice = parse_choice(RecordTurn(QUESTION, answer))
    assert isinstance(choice, Choice), choice
    assert (choice.stem, choice.options) == ("What is red?", ("a bus", "the hat", "two cats"))
    assert (choice.letter, choice.with_text) == (letter, with_text)
    assert parse_choice(choice.turn()) == choice


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (RecordTurn("What is red?", "A"), "has no options"),
        (RecordTurn("A. one\nB. two", "A"), "no question before"),
        (RecordTurn(QUESTION, "D"), "the answer is D, but the last option is C"),
        (RecordTurn(QUESTION, "B. a bus"), "the answer says 'a bus', but option B is 'the hat'"),
        (RecordTurn(QUESTION, "a green car"), "none of the options"),
        (RecordTurn(QUESTION, "A bus"), None),
    ],
)
def test_what_is_no_choice(turn, reason):
    choice = parse_choice(turn)
    if reason is None:
        assert isinstance(choice, Choice) and choice.letter == "A"
    else:
        assert isinstance(choice, str) and reason in choice


def test_a_sentence_with_a_letter_is_no_option():
    assert split_options("What is in the box?\nA. Smith's name is on it.") == (
        "What is in the box?\nA. Smith's name is on it.",
        (),
    )
