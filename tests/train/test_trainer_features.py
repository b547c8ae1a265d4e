"""What transformers' Trainer offers works in FusionTrainer, or is refused in words."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.training_runs import write_model
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.data import default_data_collator

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.common.errors import InputError
from fusion_hf.training import FusionDataCollator, FusionTrainer, FusionTrainingArguments
from fusion_hf.training.trainer_checks import warn_of_half_weights

WORDS = "red blue two one no yes circle square".split()
SETTINGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "query_lens": [1, 4],
    "max_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "peak_tflops": 1.0,
    "logging_steps": 1,
}


def make_records(count: int = 8, first: int = 0) -> list[dict]:
    """Answers of one to three words; every third record has no image."""
    rng = np.random.default_rng(first)
    records = []
    for number in range(first, first + count):
        answer = " ".join(WORDS[(number + place) % 8] for place in range(1 + number % 3))
        messages = [
            {"role": "user", "content": "what color is the shape ?"[: 10 + number]},
            {"role": "assistant", "content": answer},
        ]
        record = {"id": str(number), "messages": messages}
        if number % 3:
            record["image"] = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        records.append(record)
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make(folder, tmp_path):
    def trainer(records=None, kind=FusionTrainer, collator=None, dtype=torch.float32, arguments=None, **settings):
        names = ("compute_metrics", "compute_loss_func", "eval_dataset")
        parts = {name: settings.pop(name) for name in names if name in settings}
        model = FusionForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        made = FusionTrainingArguments(str(tmp_path / "out"), **SETTINGS | settings)
        usual = FusionDataCollator(FusionProcessor.from_pretrained(folder), compact=settings.get("seed") == 1)
        return kind(
            model,
            made if arguments is None else arguments,
            usual if collator is None else collator,
            train_dataset=make_records() if records is None else records,
            **parts,
        )

    return trainer


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("label_smoothing_factor", 0.1, "compute_loss"),
        ("train_sampling_strategy", "sequential", "group_by"),
        ("train_sampling_strategy", "group_by_length", "group_by"),
        ("average_tokens_across_devices", False, "loss_average"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(tmp_path, name, value, instead):
    with pytest.raises(InputError, match=rf"`{name}` must be .*, got {value!r}.*{instead}"):
        FusionTrainingArguments(str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("loss_average", "sum", "tokens, micro_batches"),
        ("query_len_draw", "epoch", "step, micro_batch"),
        ("on_truncated", "skip", "error, load"),
        ("max_image_pixels", 0, "1 or more"),
    ],
)
def test_impossible_values_name_the_possible_ones(tmp_path, name, value, allowed):
    with pytest.raises(InputError, match=rf"`{name}` must be .*{allowed}.*, got {value!r}"):
        FusionTrainingArguments(str(tmp_path), **{name: value})


def test_a_loss_of_ones_own_is_refused(make):
    with pytest.raises(InputError, match=r"`compute_loss_func` must be None.*[Oo]verride .*compute_loss"):
        make(compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())


def test_plain_arguments_and_collators_are_refused(make, tmp_path):
    with pytest.raises(InputError, match=r"`args` must be FusionTrainingArguments.*got a TrainingArguments"):
        make(arguments=TrainingArguments(str(tmp_path), report_to="none"))
    with pytest.raises(InputError, match=r"`data_collator` must be a FusionDataCollator.*got a function"):
        make(collator=default_data_collator)


def test_several_gpus_in_one_process_are_refused(make, tmp_path):
    arguments = FusionTrainingArguments(str(tmp_path), **SETTINGS)
    arguments._n_gpu = 2
    with pytest.raises(InputError, match=r"must use one GPU, got 2.*torchrun --nproc-per-node 2"):
        make(arguments=arguments)


class SeveralProcesses(FusionTrainingArguments):
    world_size = 2


class Stream(IterableDataset):
    def __init__(self, records):
        self.records = records

    def __iter__(self):
        return iter(self.records)


def test_what_several_processes_cannot_do_is_refused(make, tmp_path):
    with pytest.raises(InputError, match=r"`train_dataset` must be .*streaming=True.* with 2 processes, got a Stream"):
        make(Stream(make_records()), arguments=SeveralProcesses(str(tmp_path), **SETTINGS))
    arguments = SeveralProcesses(str(tmp_path), auto_find_batch_size=True, **SETTINGS)
    with pytest.raises(
        InputError, match="`auto_find_batch_size` must be false with several processes, got True with 2"
    ):
        make(arguments=arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_coarse_weights_warns(make, caplog, dtype):
    with caplog.at_level(logging.WARNING):
        make(dtype=dtype, learning_rate=1e-5).train()
    assert ("torch.bfloat16" in caplog.text and "dtype=torch.float32" in caplog.text) == (dtype == torch.bfloat16)


def test_coarse_weights_that_are_frozen_or_kept_exactly_do_not_warn(folder, caplog):
    model = FusionForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    warn_of_half_weights(model, keeps_float32=True)
    model.requires_grad_(False)
    model.lm_head.float().requires_grad_(True)
    warn_of_half_weights(model, keeps_float32=False)
    assert not caplog.text


# ---- evaluation ----


def language_loss(prediction) -> float:
    """The mean of -log p over labelled tokens, by hand."""
    logits = torch.tensor(prediction.predictions)[:, :-1]
    labels = torch.tensor(prediction.label_ids)[:, 1:]
    chosen = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return float(-chosen[labels != -100].mean())


@pytest.mark.parametrize("seed", [0, 1], ids=["plain", "compact"])
def test_metrics_are_computed_of_logits_and_labels(make, seed):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"by_hand": language_loss(prediction)}

    trainer = make(seed=seed, eval_dataset=make_records(8), compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    (prediction,) = seen
    assert prediction.predictions.shape == (*prediction.label_ids.shape, trainer.fusion_config.text_config.vocab_size)
    collator = FusionDataCollator(trainer.data_collator.processor)
    model, records = trainer.model.eval(), make_records(8)
    total = count = 0.0
    for record in records:
        with torch.no_grad():
            batch = collator([record])
            labels = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).language_loss) * labels
            count += labels
    assert metrics["eval_by_hand"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1], ids=["plain", "compact"])
def test_predictions_are_logits(make, seed):
    trainer = make(seed=seed)
    result = trainer.predict(make_records(5))
    assert result.predictions.shape[:2] == result.label_ids.shape
    assert len(result.predictions) == 5
    assert np.isfinite(result.metrics["test_loss"])
    again = trainer.predict(make_records(5))  # no number of latent tokens is drawn
    np.testing.assert_array_equal(result.predictions, again.predictions)


def test_several_sets_are_evaluated_apart(make, tmp_path):
    sets = {"first": make_records(4), "second": Stream(make_records(5, first=20))}
    trainer = make(eval_dataset=sets, eval_samples=3, eval_max_new_tokens=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    entries = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    found = {name: value for entry in entries for name, value in entry.items()}
    assert found["eval_first_answers"] == found["eval_second_answers"] == 3
    for name, records in sets.items():
        alone = trainer.evaluate(records)
        assert found[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"])
        assert found[f"eval_{name}_accuracy"] == alone["eval_accuracy"]
    assert found["eval_first_loss"] != found["eval_second_loss"]
    with_names = trainer.evaluate(sets)
    assert {"eval_first_accuracy", "eval_second_accuracy"} <= with_names.keys()


def test_skipped_records_are_not_asked(make):
    records = [{"id": "0", "skipped": "broken image"}, *make_records(3)]
    metrics = make(eval_dataset=records, eval_samples=4, eval_max_new_tokens=2).evaluate()
    assert metrics["eval_answers"] == 3


# ---- memory ----


class SmallMemory(FusionTrainer):
    """Runs out of memory for more than `fits` records, from step `since` on."""

    fits, since = 1, 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes = []

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)  # after a part of the step has been summed up
        if len(inputs["input_ids"]) > self.fits and self.state.global_step >= self.since:
            raise RuntimeError("CUDA out of memory.")
        self.sizes.append(len(inputs["input_ids"]))
        return loss


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_smaller_batches_leave_the_step_as_it_is(make):
    settings = {"global_batch_size": 6, "max_steps": 3, "per_device_train_batch_size": 6}
    expected = make(make_records(18), **settings)
    expected.train()
    kind = type("Small", (SmallMemory,), {"fits": 2})
    trainer = make(make_records(18), kind=kind, auto_find_batch_size=True, **settings)
    trainer.train()
    assert trainer.sizes == [2] * 9  # 6, 3 and then 2 at a time
    assert trainer.args.gradient_accumulation_steps == 3
    np.testing.assert_allclose(losses(trainer), losses(expected), rtol=1e-4)
    for name, weight in expected.model.named_parameters():
        if not name.endswith(("k_proj.bias", "k_norm.bias")):  # without influence: their gradients are rounding
            torch.testing.assert_close(weight, trainer.model.get_parameter(name), rtol=1e-3, atol=1e-5)


def test_memory_that_ends_later_ends_the_run(make):
    kind = type("Later", (SmallMemory,), {"since": 1})
    trainer = make(kind=kind, auto_find_batch_size=True)
    with pytest.raises(InputError, match=r"after step 1.*per_device_train_batch_size` to less than 2"):
        trainer.train()


def test_memory_for_no_record_is_told(make):
    kind = type("None", (SmallMemory,), {"fits": 0})
    with pytest.raises(InputError, match="one record at a time"):
        make(kind=kind, auto_find_batch_size=True).train()
