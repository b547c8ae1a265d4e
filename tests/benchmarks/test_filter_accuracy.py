"""Filters against drawn records with known faults and without."""

import pytest
from filter_accuracy import ACROSS, FILTERS, broken, fault_kinds, measure
from filter_faults import FAULTS
from filter_lookalikes import LOOKALIKES

from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.filters import build_filters
from fusion_hf.synthesis.filters.grounded import ColorsFilter
from fusion_hf.synthesis.procedural.drawn_records import plan

RECORDS = 4  # of each kind and category
SEED = 11
LEAST = 0.9  # precision and recall


@pytest.fixture(scope="module")
def figures():
    return {found.name: found for found in measure(RECORDS, SEED)}


@pytest.mark.parametrize("name", FILTERS)
def test_precision_and_recall(figures, name: str):
    found = figures[name]
    assert found.recall >= LEAST, found.cases
    assert found.precision >= LEAST, found.cases
    assert {case.fault for case in found.cases} == {True, False}


def test_every_kind_of_record_is_measured(figures):
    measured = {case.name for found in figures.values() for case in found.cases}
    assert measured == {case.name for case in (*FAULTS, *LOOKALIKES)}
    assert all(case.records >= RECORDS for found in figures.values() for case in found.cases)


def test_a_filter_that_keeps_or_rejects_everything_would_be_seen(monkeypatch):
    for reason, name, least in ((None, "recall", 0.0), ("no", "kept", 0.0)):
        monkeypatch.setattr(ColorsFilter, "check", lambda self, record, r=reason: r)
        (found,) = measure(1, SEED, ["colors"])
        assert getattr(found, name) == least


@pytest.mark.parametrize("name", list(load_categories()))
def test_every_rule_has_faults_in_a_category(name: str):
    filters = {rule.name: rule for rule in build_filters(load_categories()[name])}
    rules = {case.name: case.rule for case in FAULTS}
    kinds = fault_kinds(name)
    assert {rules[kind] for kind in kinds} == {*filters, *ACROSS} - _impossible(name)
    for kind in kinds:
        record = broken(name, kind, SEED, 0)
        assert record == broken(name, kind, SEED, 0)
        assert record != broken(name, kind, SEED, 1)


def _impossible(name: str) -> set[str]:
    """Rules of a category whose faults its drawn records cannot have: nothing of the kind is asked or said there."""
    return {
        "SynthColor": {"counts"},
        "SynthSpatial": {"counts", "leakage"},
        "SynthReasoning": {"leakage", "colors"},
        "SynthMultiChoice": {"leakage"},
    }.get(name, set())


def test_other_faults_are_named():
    with pytest.raises(ValueError, match=r"`kind` must be one of no turns.* for SynthColor, got 'equal pair'"):
        broken("SynthColor", "equal pair", 0, 0)
    assert plan("SynthColor", 0, 0).record.id == "SynthColor-0-0"
