"""A training run: losses that do not depend on the split, learning rates by part, resuming, logs, evaluation."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.common.errors import InputError
from fusion_hf.training import run as training
from fusion_hf.training.parameter_groups import PARTS, part_of
from fusion_hf.training.recipe import load_recipe, make_arguments


def losses(values: dict) -> list[float]:
    assert training.run(values)
    return [entry["loss"] for entry in log(values) if "loss" in entry]


def log(values: dict) -> list[dict]:
    return [json.loads(line) for line in (Path(values["output_dir"]) / "log.jsonl").read_text().splitlines()]


def weights(values: dict) -> dict[str, torch.Tensor]:
    return FusionForConditionalGeneration.from_pretrained(values["output_dir"], dtype=torch.float32).state_dict()


def test_accumulation_equals_one_batch(recipe, tmp_path):
    whole = load_recipe(recipe, ["max_steps=3", "global_batch_size=8", f"output_dir={tmp_path / 'whole'}"])
    parts = load_recipe(
        recipe,
        ["max_steps=3", "global_batch_size=8", "gradient_accumulation_steps=4", f"output_dir={tmp_path / 'parts'}"],
    )
    np.testing.assert_allclose(losses(whole), losses(parts), rtol=1e-5)
    for key in ("language_loss", "mapping_loss", "grad_norm"):
        np.testing.assert_allclose([e[key] for e in log(whole)[:3]], [e[key] for e in log(parts)[:3]], rtol=1e-4)
    split = weights(parts)
    for name, weight in weights(whole).items():
        error = float(torch.dist(weight, split[name]) / weight.norm())
        # a bias of attention's keys has no influence: its gradient is zero, and what moves it is rounding
        assert error <= 1e-4 or name.endswith(("k_proj.bias", "k_norm.bias")), f"{name}: {error}"


def test_a_resumed_run_has_the_same_losses_to_the_last_bit(recipe, tmp_path):
    settings = ["use_cpu=true", "num_train_epochs=2", "save_strategy=steps", "save_steps=4"]
    straight = load_recipe(recipe, [*settings, f"output_dir={tmp_path / 'straight'}"])
    expected = losses(straight)
    broken = load_recipe(recipe, [*settings, f"output_dir={tmp_path / 'broken'}"])
    trainer = training.make_trainer(
        *reversed(training.load_start(make_arguments(broken, 1))), make_arguments(broken, 1)
    )
    trainer.train()
    for step in (8, 12):  # as if it had been killed in the second epoch, between two steps
        (tmp_path / "broken" / f"checkpoint-{step}" / "complete.json").unlink()
    assert losses(broken) == expected
    assert len(expected) == 12
    assert (tmp_path / "broken" / "incomplete-checkpoint-12").is_dir()
    again = weights(broken)
    assert all(torch.equal(weight, again[name]) for name, weight in weights(straight).items())


def test_a_finished_run_is_not_repeated_and_a_changed_one_not_continued(recipe):
    values = load_recipe(recipe, ["max_steps=2", "save_strategy=steps", "save_steps=1"])
    losses(values)
    before = len(log(values))
    assert training.run(values)
    assert len(log(values)) == before
    (Path(values["output_dir"]) / "finished.json").unlink()
    with pytest.raises(InputError, match=r"`learning_rate` must be 0\.0001, .*got 1\.0"):
        training.run({**values, "learning_rate": 1.0})


def test_a_run_says_how_it_began_as_overrides(recipe):
    """Also one that was begun when its recipe, or this package, had fewer keys."""
    values = load_recipe(recipe, ["max_steps=2", "save_strategy=steps", "save_steps=1"])
    losses(values)
    (Path(values["output_dir"]) / "finished.json").unlink()
    now = {**values, "max_grad_norm": 0.0, "loss_average": "micro_batches", "query_lens": [4], "max_image_pixels": 9}
    with pytest.raises(InputError, match=r"`query_lens` must be \[4, 16\], .*got \[4\]") as error:
        training.run(now)
    overrides = str(error.value).partition("the same value (")[2].partition("), another")[0]
    assert "max_grad_norm=1.0" in overrides and "loss_average=tokens" in overrides
    settings = ["max_steps=2", "save_strategy=steps", "save_steps=1", *shlex.split(overrides)]
    assert training.run(load_recipe(recipe, settings))


def test_logs_tell_the_losses_apart_and_the_speed(recipe):
    values = load_recipe(recipe, ["max_steps=2"])
    losses(values)
    for entry in log(values)[:2]:
        assert entry["loss"] == pytest.approx(entry["language_loss"] + 0.1 * entry["mapping_loss"], rel=1e-5)
        assert entry["tokens_per_second"] > 0
        assert 0 < entry["model_flops_utilization"] < 1.5
        assert 0 < entry["data_wait"] < 1


@pytest.mark.parametrize("part", PARTS)
def test_only_the_named_part_is_trained(recipe, part):
    values = load_recipe(recipe, ["max_steps=1", f"train={part}"])
    before = FusionForConditionalGeneration.from_pretrained(values["model"], dtype=torch.float32).state_dict()
    losses(values)
    changed = {name for name, weight in weights(values).items() if not torch.equal(weight, before[name])}
    assert changed
    assert {part_of(name) for name in changed} == {part}


def test_each_part_has_its_learning_rate(recipe):
    values = load_recipe(
        recipe, ["vision_tower_learning_rate=1e-6", "projector_learning_rate=2e-6", "sampler_learning_rate=3e-6"]
    )
    arguments = make_arguments(values, 1)
    trainer = training.make_trainer(*reversed(training.load_start(arguments)), arguments)
    optimizer = trainer.create_optimizer()
    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"vision_tower": 1e-6, "projectors": 2e-6, "samplers": 3e-6, "language_model": 1e-4}
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in trainer.model.parameters())


def test_held_out_questions_are_answered(recipe):
    values = load_recipe(
        recipe,
        [
            *("max_steps=1", "train=projectors", "eval_strategy=steps", "eval_steps=1", "eval_samples=5"),
            *("per_device_eval_batch_size=2", f"eval_data={recipe.parent / 'data' / 'records.json'}"),
        ],
    )
    losses(values)
    entry = next(entry for entry in log(values) if "eval_accuracy" in entry)
    assert entry["eval_answers"] == 5
    assert entry["eval_accuracy"] >= 0.6  # fusion-nano knows colours; without an image it guesses


def test_a_stream_trains_and_resumes(recipe, tmp_path):
    settings = ["use_cpu=true", "streaming=true", "max_steps=6", "save_strategy=steps", "save_steps=3"]
    straight = load_recipe(recipe, [*settings, f"output_dir={tmp_path / 'straight'}"])
    expected = losses(straight)
    folder = tmp_path / "straight"
    (folder / "finished.json").unlink()
    (folder / "checkpoint-6" / "complete.json").unlink()
    assert losses(straight) == expected
    with pytest.raises(InputError, match="`max_steps` must be 1 or more with streaming"):
        training.run({**straight, "max_steps": -1, "output_dir": str(tmp_path / "other")})


def test_the_finished_weights_have_the_type_that_was_asked_for(recipe):
    values = load_recipe(recipe, ["max_steps=1", "save_dtype=bfloat16"])
    losses(values)
    model = FusionForConditionalGeneration.from_pretrained(values["output_dir"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_skipped_images_leave_the_other_records_and_the_run_intact(recipe, records):
    for record in records[1:4]:
        Path(record["image"]).write_bytes(b"no picture")
    values = load_recipe(recipe, ["global_batch_size=1", "on_broken=skip"])
    found = losses(values)
    assert len(found) == len(records)
    assert np.isfinite(found).all()
    skipped = [json.loads(line) for line in (Path(values["output_dir"]) / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["id"] for entry in skipped) == ["1", "2", "3"]
    with pytest.raises(InputError, match=r"records\.json"):
        training.run({**values, "on_broken": "error", "output_dir": values["output_dir"] + "-2"})


def test_a_step_without_labels_is_told_and_trains_the_mapping_alone(recipe, caplog):
    values = load_recipe(
        recipe, ["max_steps=1", "max_length=48", "query_lens=[4]"]
    )  # the image leaves no room for answers
    losses(values)
    assert "Step 1 has no labelled tokens. Is `max_length` too short?" in caplog.text
    assert log(values)[0]["language_loss"] == 0
    assert log(values)[0]["mapping_loss"] > 0


def test_a_run_killed_while_its_model_was_written_takes_no_further_step(recipe, tmp_path):
    # 24 records make 6 steps an epoch: the run ends within its second epoch, and not at a rate of zero
    settings = ["max_steps=8", "save_strategy=steps", "save_steps=8", "lr_scheduler_type=constant"]
    values = load_recipe(recipe, settings)
    expected = losses(values)
    before = weights(values)
    (tmp_path / "run" / "finished.json").unlink()
    assert losses(values) == expected
    assert len(expected) == 8
    assert all(torch.equal(weight, before[name]) for name, weight in weights(values).items())
