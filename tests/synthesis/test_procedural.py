"""The procedural backend: facts, images and answers agree, for all categories, and the same in each run."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from tests.synthesis.runs import letter_shares

from fusion_hf.drawing.drawn_images import COLORS, MAX_COUNT
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.choices import Choice, parse_choice
from fusion_hf.synthesis.filters import build_filters, first_problem
from fusion_hf.synthesis.filters.options import OptionsBalance
from fusion_hf.synthesis.filters.words import UNITS
from fusion_hf.synthesis.procedural import draw
from fusion_hf.synthesis.procedural.drawn_records import plan
from fusion_hf.synthesis.synth_record import SynthRecord

NAMES = list(load_categories())
DRAWN = 60  # records of a category
LEAST_PIXELS = 10  # of a color that an image has, of 64 x 64


def records(name: str, count: int = DRAWN, seed: int = 0) -> list[SynthRecord]:
    return [plan(name, seed, index).record for index in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_records_are_whole_and_pass_the_filters(name: str):
    category = load_categories()[name]
    filters = build_filters(category)
    for record in records(name):
        assert first_problem(record, filters).rejection is None
        assert SynthRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
        assert len(record.descriptions) == category.pictures
        least, most = category.turns
        assert least <= len(record.turns) <= most


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_record(name: str):
    first, again, other = draw(name, 3, 5), draw(name, 3, 5), draw(name, 4, 5)
    assert first.record == again.record
    assert first.record.id != other.record.id
    for image, same in zip(first.images, again.images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(same))
    distinct = {(record.descriptions, record.turns) for record in records(name)}
    assert len(distinct) > DRAWN / 2


@pytest.mark.parametrize("name", NAMES)
def test_images_show_the_facts(name: str):
    for index in range(10):
        drawn = draw(name, 0, index)
        for image, facts in zip(drawn.images, drawn.record.facts["pictures"], strict=True):
            pixels = np.asarray(image).reshape(-1, 3)
            shown = {color for color, rgb in COLORS.items() if (pixels == rgb).all(axis=1).sum() >= LEAST_PIXELS}
            known = {shape["color"] for shape in facts["shapes"]}
            written = {facts["word"]["color"]} if facts["word"] else set()
            assert known <= shown <= known | written


def test_numbers_are_those_of_the_facts():
    asked = Counter()
    for record in records("SynthCount", 200):
        (facts,) = record.facts["pictures"]
        for turn in record.turns:
            words = re.sub("how many|are there|are in the image|\\?", "", turn.question.lower()).split()
            wanted = [word for word in words if word != "shapes"]
            value = wanted[0].removesuffix("s") if wanted else ""
            count = sum(value in ("", shape["kind"], shape["color"]) for shape in facts["shapes"])
            said = set(re.findall(r"\w+", turn.answer.lower()))
            assert said & {str(count), UNITS[count] if count else "no"}, turn
            asked[count] += 1
    assert set(asked) == set(range(MAX_COUNT + 1))


def test_colors_are_those_of_the_facts():
    for record in records("SynthColor", 100):
        (facts,) = record.facts["pictures"]
        for turn in record.turns:
            kind = re.search("circle|rectangle|triangle", turn.question)
            if kind is not None:
                (color,) = [shape["color"] for shape in facts["shapes"] if shape["kind"] == kind.group()]
                assert color in turn.answer.lower()


def test_pairs_differ_in_one_thing():
    for record in records("SynthContrastShort", 100):
        first, second = record.facts["pictures"]
        assert first != second
        left, right = ([tuple(shape.values()) for shape in facts["shapes"]] for facts in (first, second))
        changed = set(left) ^ set(right)
        word = first["word"] != second["word"]
        assert len(changed) in ((0,) if word else (1, 2))
        assert first["background"] == second["background"]


def test_the_right_option_is_the_only_right_one():
    for record in records("SynthMultiChoice"):
        for turn in record.turns:
            choice = parse_choice(turn)
            assert isinstance(choice, Choice)
            assert len({option.lower() for option in choice.options}) == len(choice.options) >= 3


def test_options_of_drawn_records_can_be_balanced():
    balanced = list(map(OptionsBalance().balanced, records("SynthMultiChoice", 100)))
    for options, shares in letter_shares(balanced).items():
        assert max(shares.values()) - min(shares.values()) <= 0.03, (options, shares)


def test_unknown_category():
    with pytest.raises(ValueError, match=r"`category` must be one of SynthColor.*got 'SynthSmell'"):
        draw("SynthSmell", 0, 0)
