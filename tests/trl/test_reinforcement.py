"""TRL's trainers that sample, GRPO and RLOO: the policy that is trained is the one that was sampled from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tests.helpers.gradients import KeepGradients, assert_same_gradients, gradients_of
from tests.trl.conftest import (
    CHATS,
    LORA,
    ONE_STEP,
    Pass,
    Prompt,
    Subject,
    assert_own_log_probs,
    columns_of,
    mapping_loss,
    prompt_of,
    prompts_of,
    record_passes,
)

from fusion_hf import FusionForConditionalGeneration

pytest.importorskip("trl", reason="TRL is installed in an environment of its own: make test-trl")

from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

pytestmark = pytest.mark.trl

GENERATIONS = 2
ROUNDING = 5e-5  # relative; gradients of two answers to one prompt cancel
# 4 prompts, 2 completions each, in 2 passes of 4 rows
SAMPLING = {**ONE_STEP, "num_generations": GENERATIONS, "max_completion_length": 4, "steps_per_generation": 2}


def rows_of(prompts: list[Prompt], has_images: bool = True) -> datasets.Dataset:
    return datasets.Dataset.from_list([columns_of(prompt, has_images) for prompt in prompts])


def rewards(completions: list[Any], **_: Any) -> list[float]:
    """Any that differ within a group."""
    return [float(number % GENERATIONS) for number, _ in enumerate(completions)]


@dataclass
class SampledRow:
    """One completion behind its prompt, without padding; `(n,)` of each of its tokens."""

    ids: list[int]
    log_probs: torch.Tensor  # of all tokens that have logits
    sampled_log_probs: torch.Tensor  # of the tokens that can be sampled
    placeholders: torch.Tensor  # probability of the others


@dataclass
class Sampled:
    """Records what a model's `generate` samples."""

    model: FusionForConditionalGeneration
    rows: list[SampledRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own_generate = self.model.generate
        self.model.generate = self.generate

    def generate(self, **kwargs: Any) -> torch.Tensor:
        options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        outputs = self.own_generate(**kwargs, **options)
        length = kwargs["input_ids"].shape[1]
        tokens = outputs.sequences[:, length:, None]  # (B, n, 1)
        logits, scores = (torch.stack(steps, 1).log_softmax(-1) for steps in (outputs.logits, outputs.scores))
        config = self.model.config
        behind = logits.shape[-1]
        ids = [index for index in (config.image_token_id, config.latent_token_id) if index < behind]
        placeholders = logits[..., ids].exp().sum(-1)  # (B, n)
        log_probs, sampled = (values.gather(2, tokens)[..., 0] for values in (logits, scores))
        for row, mask in enumerate(kwargs["attention_mask"].bool()):
            sequence = outputs.sequences[row]
            kept = [*sequence[:length][mask].tolist(), *sequence[length:].tolist()]
            self.rows.append(SampledRow(kept, log_probs[row], sampled[row], placeholders[row]))
        return outputs.sequences


def assert_sampled(passed: Pass, sampled: Sampled) -> None:
    """The policy of a pass is the one that was sampled from, but for placeholders, which are never sampled."""
    for ids, log_probs in passed.rows():
        drawn = next(row for row in sampled.rows if row.ids[: len(ids)] == ids)
        own, policy, placeholders = (
            values[: len(log_probs)] for values in (drawn.log_probs, drawn.sampled_log_probs, drawn.placeholders)
        )
        torch.testing.assert_close(log_probs, own, atol=1e-5, rtol=0)
        torch.testing.assert_close(log_probs - torch.log1p(-placeholders), policy, atol=1e-5, rtol=0)
        assert placeholders.max() < 0.01


@pytest.mark.parametrize("has_images", [True, False])
def test_grpo_trains_the_policy_that_it_samples(subject: Subject, has_images: bool, tmp_path: Path):
    (model, processor), keep = subject.load(), KeepGradients()
    prompts = prompts_of(processor, has_images)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=tmp_path, gradient_accumulation_steps=2, **SAMPLING),
        train_dataset=rows_of(prompts, has_images),
        processing_class=processor,
        callbacks=[keep],
    )
    sampled, passes = Sampled(model), record_passes(model)
    trainer.train()

    model, _ = subject.load()
    assert [passed.has_gradient for passed in passes] == [True, True]
    assert len(sampled.rows) == len(CHATS) * GENERATIONS
    for passed in passes:
        assert_own_log_probs(passed, model, prompts)
        assert_sampled(passed, sampled)
    policy_gradient(model, prompts, passes, sampled).backward()
    assert_same_gradients(keep.gradients, gradients_of(model), ROUNDING)


def policy_gradient(
    model: FusionForConditionalGeneration, prompts: list[Prompt], passes: list[Pass], sampled: Sampled
) -> torch.Tensor:
    """The loss of GRPO in its first step: the mean over tokens of both passes, and the mapping loss of each pass."""
    advantage = 0.5 / (torch.tensor([0.0, 1.0]).std().item() + 1e-4)  # of the rewards 0 and 1, one with each sign
    rows = [ids for passed in passes for ids, _ in passed.rows()]
    num_tokens = sum(len(log_probs) for passed in passes for _, log_probs in passed.rows())
    loss = torch.zeros(())
    for number, drawn in enumerate(sampled.rows):
        ids = next(ids for ids in rows if drawn.ids[: len(ids)] == ids)
        prompt = prompt_of(ids, prompts)
        log_probs = prompt.log_probs(model, ids[len(prompt.ids) :])
        loss = loss + (-advantage if number % GENERATIONS else advantage) * log_probs.sum() / num_tokens
    for passed in passes:
        weight = advantage * sum(len(log_probs) for _, log_probs in passed.rows()) / num_tokens
        loss = loss + weight * mapping_loss(model, [prompt_of(ids, prompts) for ids, _ in passed.rows()])
    return loss


def test_grpo_iterates_beside_a_reference(subject: Subject, tmp_path: Path):
    model, processor = subject.load()
    prompts = prompts_of(processor)
    arguments = {**SAMPLING, "max_steps": 4, "num_iterations": 2, "learning_rate": 0.01}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=tmp_path, beta=0.1, **arguments),
        train_dataset=rows_of(prompts),
        processing_class=processor.without_turns(),
    )
    sampled, passes, reference_passes = Sampled(model), record_passes(model), record_passes(trainer.ref_model)
    trainer.train()

    model, _ = subject.load()
    # all rows as they were sampled, then each half twice
    assert [passed.has_gradient for passed in passes] == [False, False, True, True, True, True]
    for passed in passes[:3]:
        assert_own_log_probs(passed, model, prompts)
        assert_sampled(passed, sampled)
    assert (passes[4].log_probs - passes[2].log_probs).abs().max() > 0.01  # the same rows, after two steps
    assert [passed.has_gradient for passed in reference_passes] == [False, False]
    for passed in reference_passes:
        assert_own_log_probs(passed, model, prompts)


def test_rloo(subject: Subject, tmp_path: Path):
    model, processor = subject.load()
    prompts = prompts_of(processor)
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=rewards,
        args=RLOOConfig(output_dir=tmp_path, beta=0.1, gradient_accumulation_steps=2, **SAMPLING),
        train_dataset=rows_of(prompts),
        processing_class=processor.without_turns(),
    )
    sampled, passes, reference_passes = Sampled(model), record_passes(model), record_passes(trainer.ref_model)
    trainer.train()

    model, _ = subject.load()
    assert [passed.has_gradient for passed in passes] == [False, False, True, True]
    for passed in passes:
        assert_own_log_probs(passed, model, prompts)
        assert_sampled(passed, sampled)
    for passed in reference_passes:
        assert_own_log_probs(passed, model, prompts)


def test_grpo_of_an_adapter(folders: dict[str, Path], tmp_path: Path):
    subject = Subject("nano", folders["nano"])
    model, processor = subject.load()
    prompts = prompts_of(processor)
    arguments = {**SAMPLING, "max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.05}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=tmp_path, beta=0.1, **arguments),
        train_dataset=rows_of(prompts),
        processing_class=processor.without_turns(),
        peft_config=LoraConfig(**LORA),
    )
    passes = record_passes(trainer.model.get_base_model())
    trainer.train()

    model, _ = subject.load()
    assert [passed.has_gradient for passed in passes] == [False, False, True, True] * 2
    # the reference is the model without its adapter, which does nothing in the first step
    for passed in (*passes[:4], *passes[4:6]):
        assert_own_log_probs(passed, model, prompts)
    with pytest.raises(AssertionError):
        assert_own_log_probs(passes[6], model, prompts)


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_inputs_that_trl_does_not_hand_on(trainer: str, folders: dict[str, Path], tmp_path: Path):
    """The guide says that this error means: give the trainer `processor.without_turns()`."""
    kind, arguments = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[trainer]
    model, processor = Subject("nano", folders["nano"]).load()
    made = kind(
        model=model,
        reward_funcs=rewards,
        args=arguments(output_dir=tmp_path, beta=0.1, gradient_accumulation_steps=2, **SAMPLING),
        train_dataset=rows_of(prompts_of(processor)),
        processing_class=processor,
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'instruct_input_ids'"):
        made.train()
