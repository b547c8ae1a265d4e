"""The values of two sides at one stage, and the first stage that differs."""

import pytest
import torch

from fusion_hf.evaluation.stage_comparison import STAGES, StageComparison, compare_stage, first_difference


@pytest.mark.parametrize(
    ("first", "second", "detail"),
    [
        ("one two", "one  two", "from character 4 on: 'one two' and 'one  two'"),
        ("one", "one two", "from character 3 on: 'one' and 'one two'"),
        ([1, 2, 3], [1, 5, 3], "from position 1 on: 2 and 5; 3 and 3 ids"),
        ([1, 2], [1, 2, 3], "from position 2 on: the end and 3; 2 and 3 ids"),
        (1.0, 0.0, "1.0 and 0.0"),
        (None, 0.0, "None and 0.0"),
    ],
)
def test_values_that_must_be_equal(first, second, detail):
    found = compare_stage("ids", first, second, tolerance=1.0)
    assert (found.differs, found.detail) == (True, detail)
    assert compare_stage("ids", first, first) == StageComparison("ids", False)


def test_the_first_differing_part_is_named():
    first = {"layer 0": torch.ones(4), "layer 1": torch.ones(4), "layer 2": torch.ones(4)}
    second = {**first, "layer 1": torch.tensor([1.0, 1.0, 1.0, 1.5]), "layer 2": torch.tensor([1.0, 1.0, 1.0, 3.0])}
    found = compare_stage("features", first, second)
    assert (found.differs, found.part, found.largest, found.relative) == (True, "layer 1", 2.0, 1.0)
    assert found.detail == "from layer 1 on: largest difference 2, relative error 1"
    tolerant = compare_stage("features", first, second, tolerance=0.5)
    assert (tolerant.differs, tolerant.part) == (True, "layer 2")
    assert not compare_stage("features", first, second, tolerance=1.0).differs


def test_what_is_within_the_tolerance_is_still_told():
    found = compare_stage("logits", torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.5]), tolerance=0.3)
    assert (found.differs, found.largest, found.relative) == (False, 0.5, 0.25)
    assert compare_stage("logits", torch.ones(4), torch.ones(4, dtype=torch.bfloat16)).detail == ""


@pytest.mark.parametrize("tolerance", [0.0, 10.0])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_no_number_differs(broken, tolerance):
    found = compare_stage("logits", torch.ones(2), torch.tensor([1.0, broken]), tolerance)
    assert (found.differs, found.largest, found.relative) == (True, torch.inf, torch.inf)


def test_other_shapes_and_parts_differ():
    assert compare_stage("pixels", torch.ones(2, 3), torch.ones(3, 2)).detail == "shape (2, 3) and (3, 2)"
    found = compare_stage("features", {"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    assert found.detail == "only one run has b"


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"`stage` must be one of prompt, ids, pixels, .*got 'pixel'"):
        compare_stage("pixel", 1.0, 1.0)
    with pytest.raises(ValueError, match="values of ids must be of the same kind, got list and str"):
        compare_stage("ids", [1], "1")


def test_the_first_stage_counts():
    later, earlier = StageComparison("logits", True), StageComparison("pixels", True)
    assert first_difference([later, StageComparison("ids", False), earlier]) is earlier
    assert first_difference([StageComparison(stage, False) for stage in STAGES]) is None
