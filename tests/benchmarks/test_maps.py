"""`benchmarks/maps.py`: what is counted, and that fusion-nano's maps lie where the documents say."""

import json

import maps_report
import numpy as np
import pytest
from maps import find, main, questions_about_shapes, shape_mask
from maps_report import DOCUMENT, RESULTS, SOURCE, render
from PIL import Image

from fusion_hf.drawing.drawn_images import DrawnImage, DrawnShape

SEVERAL = 200  # questions: their shares are within some percent of all questions'


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((RESULTS / SOURCE).read_text())


@pytest.mark.parametrize("color", ["yellow", "gray", "black"])
def test_the_mask_is_the_shape(color: str):
    shape = DrawnShape("rectangle", color, left=20, top=40, width=40, height=24)
    mask = shape_mask(DrawnImage("single", background=(255, 255, 230), shapes=(shape,)).render())
    rows, columns = np.nonzero(mask)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((10, 29, 20, 31), abs=1)
    assert mask.mean() == pytest.approx(20 * 12 / 64**2, rel=0.2)


def test_what_is_found():
    mask, other = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    mask[:2, :2] = other[2:, 2:] = True
    overlay = np.ones((4, 4))
    overlay[0, 1] = 4
    assert find(overlay, mask, other) == (True, False, pytest.approx(7 / 19 * 4))
    assert find(overlay, other, mask) == (False, True, pytest.approx(4 / 19 * 4))
    assert find(np.ones((4, 4)), mask, other).mass == 1


def test_questions_ask_for_kind_or_color():
    asked = questions_about_shapes()
    assert {one.attribute for one in asked} == {"shape", "color"}
    assert not {one.answer for one in asked} & {"yes", "no"}
    assert len(asked) > 2000
    with Image.open(asked[0].path) as image:
        assert 0 < shape_mask(image).mean() < 0.5


def test_the_document_is_up_to_date(committed: dict):
    text = DOCUMENT.read_text()
    assert maps_report.update(text, RESULTS) == text, "run: python benchmarks/report.py"
    assert committed["questions"] == len(questions_about_shapes())


def test_what_the_committed_result_shows(committed: dict):
    """Answers and the first sampler look at the shape; the question in the tower looks elsewhere."""
    total, chance = committed["questions"], committed["chance"]
    for kind, layers in (("answer", "all"), ("latents", "0")):
        found = committed["kinds"][kind][layers]
        assert found["on_shape"] / total > 3 * chance
        assert found["on_shape"] > 2 * found["on_other"]
        assert found["mass"] > 1.5
    for found in committed["kinds"]["question"].values():
        assert found["on_shape"] / total < chance
        assert found["mass"] < 1


def test_a_table_without_a_result_says_so(tmp_path):
    assert "not measured" in maps_report.update(DOCUMENT.read_text(), tmp_path)


@pytest.mark.slow
def test_maps_of_answers_lie_on_the_shape(tmp_path, committed: dict):
    output = tmp_path / "maps.json"
    result = main(["--questions", str(SEVERAL), "--threads", "1", "--output", str(output)])
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert render(result).count("\n") == render(committed).count("\n")
    for kind, layers in (("answer", "all"), ("latents", "0")):
        found = result["kinds"][kind][layers]
        share = found["on_shape"] / SEVERAL
        # four standard deviations above the chance of a place drawn at random
        assert share > result["chance"] + 4 * (result["chance"] * (1 - result["chance"]) / SEVERAL) ** 0.5
        assert share == pytest.approx(committed["kinds"][kind][layers]["on_shape"] / committed["questions"], abs=0.15)
        assert found["mass"] > 1
