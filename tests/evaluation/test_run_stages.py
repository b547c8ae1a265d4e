"""Planted differences between two runs that should be equal, each named by the first stage that differs."""

from pathlib import Path

import pytest
from tests.evaluation.compared_runs import (
    TASK,
    changed_weight,
    copy_nano,
    first_letter_missing,
    make_run,
    never_red,
    other_filter,
    space_in_template,
    swapped_words,
)

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.rebuilt_run import RebuiltRun
from fusion_hf.evaluation.run_answers import read_run
from fusion_hf.evaluation.run_comparison import SIDES, compare_runs
from fusion_hf.evaluation.run_stages import StageReport, compare_run_stages

LAYER = "model.language_model.layers.1.mlp.down_proj.weight"
PROJECTOR = "model.vision_projector.linear_1.weight"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("reference"))


def find(first: Path, second: Path) -> StageReport:
    runs = [read_run(path) for path in (first, second)]
    (task,) = compare_runs(*runs)
    return compare_run_stages(*(RebuiltRun.load(side, run) for side, run in zip(SIDES, runs, strict=True)), task)


@pytest.mark.parametrize(
    ("changes", "stages", "settings"),
    [
        ([space_in_template], ["prompt"], {"chat_template", "revision"}),
        ([swapped_words], ["ids"], {"tokenizer_sha256"}),
        ([other_filter], ["pixels"], {"image_processor.resample"}),
        ([changed_weight(PROJECTOR)], ["features"], {"revision"}),
        ([changed_weight(LAYER)], ["logits"], {"revision"}),
        ([never_red], ["decoding"], {"generation_config.suppress_tokens"}),
        ([space_in_template, other_filter], ["prompt", "pixels"], None),
        ([other_filter, changed_weight(LAYER)], ["pixels", "logits"], None),
    ],
    ids=["template", "tokenizer", "filter", "projector", "layer", "generation", "two", "two others"],
)
def test_a_planted_difference_is_named(reference, tmp_path, changes, stages, settings):
    folder = copy_nano(tmp_path / "nano", *changes)
    report = find(reference, make_run(tmp_path / "run", folder))
    assert (report.first.stage, report.differing) == (stages[0], stages)
    if settings is not None:
        assert {setting.name for setting in report.settings} == settings
    assert report.notes == []  # both runs were rebuilt to their recorded answers


def test_the_other_dtype_begins_with_the_features(reference, tmp_path):
    report = find(reference, make_run(tmp_path, dtype="bfloat16"))
    assert (report.first.stage, report.first.part, report.differing) == (
        "features",
        "vision layer 0",
        ["features", "logits"],
    )
    (dtype,) = [setting for setting in report.settings if setting.name == "dtype"]
    assert (dtype.first, dtype.second, dtype.stages) == ("float32", "bfloat16", ("features", "logits"))


def test_another_scoring_is_named(reference, tmp_path):
    report = find(reference, make_run(tmp_path, score=first_letter_missing))
    assert (report.first.stage, report.differing) == ("scoring", ["scoring"])
    assert "exact_match 1 and 0" in report.first.detail


def test_equal_runs_differ_nowhere(reference, tmp_path):
    report = find(reference, make_run(tmp_path))
    assert (report.first, report.differing, report.settings, report.notes) == (None, [], [], [])
    assert len(report.questions) == 3


def test_batches_differ_by_rounding_at_most(reference, tmp_path):
    report = find(reference, make_run(tmp_path, batch_size=8))
    assert {"features", "logits"} >= set(report.differing)
    assert all(stage.relative < 1e-5 for each in report.questions for stage in each.stages if stage.relative)
    (batch_size,) = report.settings
    assert (batch_size.name, batch_size.first, batch_size.second) == ("batch_size", 1, 8)
    assert report.notes == []


def test_the_exchanged_stage_makes_the_other_answer(reference, tmp_path):
    """Where answers changed, the exchange of the differing stage alone turns one into the other."""
    report = find(reference, make_run(tmp_path / "run", copy_nano(tmp_path / "nano", never_red)))
    assert report.questions
    for question in report.questions:
        assert question.recorded[0] == "red" != question.recorded[1]
        assert question.rebuilt == question.recorded
        assert question.exchanged == {"decoding": question.recorded[1]}


def test_a_folder_that_has_changed_is_refused(reference, tmp_path):
    folder = copy_nano(tmp_path / "nano")
    record = make_run(tmp_path / "run", folder)
    other_filter(folder)
    with pytest.raises(InputError, match="has changed since RUN_B: image_processor"):
        find(reference, record)
    changed_weight(LAYER)(folder)
    with pytest.raises(InputError, match=r"must be .*, as in the record of RUN_B, got .*--model-b"):
        find(reference, record)


def test_an_image_that_is_gone_is_named(reference, tmp_path):
    run = read_run(make_run(tmp_path))
    (task,) = compare_runs(read_run(reference), run)
    for pair in task.pairs:
        vars(pair.first)["image"] = vars(pair.second)["image"] = None
    rebuilt = RebuiltRun.load("RUN_B", run)
    with pytest.raises(InputError, match=f"No question of {TASK} can be rebuilt: .*no record names its file"):
        compare_run_stages(rebuilt, rebuilt, task)
