"""TRL's trainers of preferences: DPO, whose answers come in pairs, and KTO, whose answers come alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from tests.helpers.gradients import KeepGradients, assert_same_gradients, gradients_of
from tests.trl.conftest import (
    CHATS,
    LORA,
    ONE_STEP,
    Prompt,
    Subject,
    another_model,
    answer,
    assert_own_log_probs,
    columns_of,
    mapping_loss,
    prompts_of,
    record_passes,
)
from torch.nn.functional import logsigmoid

from fusion_hf import FusionModel

pytest.importorskip("trl", reason="TRL is installed in an environment of its own: make test-trl")

from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

pytestmark = pytest.mark.trl

BETA = 0.5
# relative; of two answers that begin alike, most of the gradients cancel
ROUNDING = 5e-5


def pairs() -> list[tuple[str, str]]:
    """An answer of each chat, and one to be learnt away from, of unequal lengths."""
    return [(good, f"{good} or not") for _, _, good in CHATS]


def pair_rows(prompts: list[Prompt], has_images: bool = True) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {**columns_of(prompt, has_images), "chosen": [answer(good)], "rejected": [answer(bad)]}
            for prompt, (good, bad) in zip(prompts, pairs(), strict=True)
        ]
    )


def singles() -> tuple[list[str], list[bool]]:
    """An answer to each chat, and whether it is a good one."""
    return [pair[number % 2] for number, pair in enumerate(pairs())], [True, False, True, False]


def single_rows(prompts: list[Prompt], has_images: bool = True) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {**columns_of(prompt, has_images), "completion": [answer(text)], "label": is_good}
            for prompt, text, is_good in zip(prompts, *singles(), strict=True)
        ]
    )


def completion_of(prompt: Prompt, text: str) -> list[int]:
    ids = prompt.conversation(text)["input_ids"][0].tolist()
    assert ids[: len(prompt.ids)] == prompt.ids
    return ids[len(prompt.ids) :]


@contextmanager
def count_mapping_losses() -> Iterator[list[bool]]:
    """Of each mapping loss that is computed, whether it has a gradient."""
    counted: list[bool] = []
    compute = FusionModel.compute_mapping_loss

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute(*args, **kwargs)
        counted.append(loss.requires_grad)
        return loss

    with mock.patch.object(FusionModel, "compute_mapping_loss", counting):
        yield counted


@pytest.mark.parametrize("has_images", [True, False])
def test_dpo(subject: Subject, has_images: bool, tmp_path: Path):
    (model, processor), reference, keep = subject.load(), another_model(subject), KeepGradients()
    prompts = prompts_of(processor, has_images)
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(output_dir=tmp_path, beta=BETA, **ONE_STEP),
        train_dataset=pair_rows(prompts, has_images),
        processing_class=processor,
        callbacks=[keep],
    )
    policy_passes, reference_passes = record_passes(model), record_passes(trainer.ref_model)
    with count_mapping_losses() as mapping_losses:
        trainer.train()

    # the same rows one by one, by hand
    model, _ = subject.load()
    reference = another_model(subject)
    completions = [
        [completion_of(prompt, text) for text in pair] for prompt, pair in zip(prompts, pairs(), strict=True)
    ]
    (policy_pass,), (reference_pass,) = policy_passes, reference_passes
    for passed, own in ((policy_pass, model), (reference_pass, reference)):
        ids = sorted(
            [*p.ids, *completion] for p, both in zip(prompts, completions, strict=True) for completion in both
        )
        assert sorted(row for row, _ in passed.rows()) == ids
        assert_own_log_probs(passed, own, prompts)
    assert (policy_pass.has_gradient, reference_pass.has_gradient) == (True, False)

    loss = torch.zeros(())
    weight = 0.0  # the sum of |d loss / d log_probs|
    for prompt, both in zip(prompts, completions, strict=True):
        with torch.no_grad():
            expected = [prompt.log_probs(reference, completion).sum() for completion in both]
        good, bad = (
            prompt.log_probs(model, completion).sum() - other for completion, other in zip(both, expected, strict=True)
        )
        margin = BETA * (good - bad)
        loss = loss - logsigmoid(margin) / len(prompts)
        weight += BETA * torch.sigmoid(-margin).item() / len(prompts) * sum(map(len, both))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)

    (loss + weight * mapping_loss(model, prompts * 2)).backward()
    assert_same_gradients(keep.gradients, gradients_of(model), ROUNDING)
    assert mapping_losses == [True]  # none for the reference


@pytest.mark.parametrize("has_images", [True, False])
def test_kto(subject: Subject, has_images: bool, tmp_path: Path):
    (model, processor), reference, keep = subject.load(), another_model(subject), KeepGradients()
    prompts = prompts_of(processor, has_images)
    texts, is_good = singles()
    trainer = KTOTrainer(
        model=model,
        ref_model=reference,
        args=KTOConfig(output_dir=tmp_path, beta=BETA, **ONE_STEP),
        train_dataset=single_rows(prompts, has_images),
        processing_class=processor,
        callbacks=[keep],
    )
    policy_passes, reference_passes = record_passes(model), record_passes(trainer.ref_model)
    with count_mapping_losses() as mapping_losses:
        trainer.train()

    model, _ = subject.load()
    reference = another_model(subject)
    completions = [completion_of(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    (other_pass, policy_pass), (other_reference_pass, reference_pass) = policy_passes, reference_passes
    for passed, own in ((policy_pass, model), (reference_pass, reference)):
        ids = sorted([*prompt.ids, *completion] for prompt, completion in zip(prompts, completions, strict=True))
        assert sorted(row for row, _ in passed.rows()) == ids
        assert_own_log_probs(passed, own, prompts)
    # answers to other prompts, from which the divergence is estimated
    assert_own_log_probs(other_pass, model, prompts)
    assert_own_log_probs(other_reference_pass, reference, prompts)
    all_passes = (other_pass, policy_pass, other_reference_pass, reference_pass)
    assert [passed.has_gradient for passed in all_passes] == [False, True, False, False]

    divergence = (other_pass.log_probs.sum() - other_reference_pass.log_probs.sum()).clamp(min=0) / len(prompts)
    loss = torch.zeros(())
    weight = 0.0
    for prompt, completion, label in zip(prompts, completions, is_good, strict=True):
        with torch.no_grad():
            expected = prompt.log_probs(reference, completion).sum()
        ratio = prompt.log_probs(model, completion).sum() - expected - divergence
        value = torch.sigmoid(BETA * ratio if label else -BETA * ratio)
        loss = loss + (1 - value) / len(prompts)
        weight += BETA * (value * (1 - value)).item() / len(prompts) * len(completion)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)

    (loss + weight * mapping_loss(model, prompts)).backward()
    assert_same_gradients(keep.gradients, gradients_of(model), ROUNDING)
    assert mapping_losses == [True]


@pytest.mark.parametrize("kind", ["nano", "phi3"])
def test_dpo_of_an_adapter(kind: str, folders: dict[str, Path], tmp_path: Path):
    subject = Subject(kind, folders[kind])
    model, processor = subject.load()
    prompts = prompts_of(processor)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=tmp_path, **{**ONE_STEP, "max_steps": 2, "learning_rate": 0.05}),
        train_dataset=pair_rows(prompts),
        processing_class=processor,
        peft_config=LoraConfig(**LORA),
    )
    passes = record_passes(trainer.model.get_base_model())
    trainer.train()

    model, _ = subject.load()
    assert [passed.has_gradient for passed in passes] == [True, False] * 2
    # the reference is the model without its adapter, which does nothing in the first step
    for passed in (passes[0], passes[1], passes[3]):
        assert_own_log_probs(passed, model, prompts)
    with pytest.raises(AssertionError):
        assert_own_log_probs(passes[2], model, prompts)


@pytest.mark.parametrize("most", [8, 30])
@pytest.mark.parametrize("trainer", ["dpo", "kto"])
def test_prompts_that_are_cut_are_refused(trainer: str, most: int, folders: dict[str, Path], tmp_path: Path):
    model, processor = Subject("nano", folders["nano"]).load()
    prompts = prompts_of(processor)
    settings: dict[str, Any] = {"model": model, "processing_class": processor}
    arguments = {"output_dir": tmp_path, "max_length": most, **ONE_STEP}
    if trainer == "dpo":
        made = DPOTrainer(args=DPOConfig(**arguments), train_dataset=pair_rows(prompts), **settings)
    else:
        rows = single_rows(prompts)
        made = KTOTrainer(args=KTOConfig(**arguments), train_dataset=rows, **settings)
    with pytest.raises(ValueError, match=r"Sample \d: `prompt_end_positions` must be at most \d+, .*`max_length`"):
        made.train()
