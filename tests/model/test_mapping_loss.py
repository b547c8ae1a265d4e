"""The mapping loss in trainers that make a loss of their own, from hidden states, logits or log-probabilities."""

import copy
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.helpers.gradients import gradients_of
from tests.helpers.tiny import Sample, make_inputs, tiny_config, tiny_model
from transformers.modeling_outputs import ModelOutput

from fusion_hf import FusionForConditionalGeneration

SAMPLES = [Sample([5], seed=1), Sample([4, 7], [3], seed=2)]
PLACEHOLDERS_BEHIND = {"image_token_id": 1000, "latent_token_id": 1001}
PLACEHOLDERS_INSIDE = {"image_token_id": 50, "latent_token_id": 51}


@dataclass
class HeadOutput(ModelOutput):
    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def replace_forward(model: FusionForConditionalGeneration, output: type[ModelOutput] = HeadOutput) -> None:
    """As TRL's fused head: its own `forward` runs the base model and sees hidden states and labels."""

    def forward(self: Any, labels: torch.Tensor, **kwargs: Any) -> ModelOutput:
        hidden_states = self.base_model(**kwargs).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        log_probs = self.lm_head(hidden_states).log_softmax(-1)
        log_probs = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
        loss = -log_probs.sum() / (labels != -100).sum()
        return output(loss=loss, log_probs=log_probs, label_mask=labels != -100)

    model.forward = types.MethodType(forward, model)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(params=[PLACEHOLDERS_INSIDE, PLACEHOLDERS_BEHIND], ids=["inside", "behind"])
def model(request) -> FusionForConditionalGeneration:
    return tiny_model(tiny_config(**request.param)).train()


@pytest.fixture
def inputs(model) -> dict[str, Any]:
    return make_inputs(model.config, SAMPLES)


@pytest.fixture
def labels(inputs) -> torch.Tensor:
    """As language-model collators make them: placeholders included."""
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.fixture
def expected(model, inputs, labels) -> dict[str, torch.Tensor]:
    own = copy.deepcopy(model)
    own(**inputs, labels=labels).loss.backward()
    return gradients_of(own)


@pytest.mark.parametrize("steps", [1, 8])
def test_the_mean_of_log_probabilities_trains_it_once(model, inputs, labels, expected, steps) -> None:
    """Also where a trainer divides it by the number of accumulated batches."""
    replace_forward(model)
    for _ in range(steps):
        outputs = model(**inputs, labels=labels)
        (-outputs.log_probs.sum() / outputs.label_mask.sum() / steps).backward()
    assert_same(gradients_of(model), expected)


def test_the_loss_of_such_a_head_contains_it(model, inputs, labels, expected) -> None:
    own = model(**inputs, labels=labels)
    replace_forward(model)
    outputs = model(**inputs, labels=labels)
    torch.testing.assert_close(outputs.loss, own.loss)
    outputs.loss.backward()
    assert_same(gradients_of(model), expected)


def test_log_probabilities_that_are_weighted_train_it_in_proportion(model, inputs, labels) -> None:
    weights = torch.tensor([0.75, -0.25])  # as of a chosen and a rejected answer
    replace_forward(model)
    outputs = model(**inputs, labels=labels)
    (outputs.log_probs.sum(1) * weights).sum().backward()
    own = copy.deepcopy(model)
    own.zero_grad()
    del own.forward
    result = own(**inputs, labels=labels)
    count = outputs.label_mask.sum(1)
    targets = labels[:, 1:].masked_fill(~outputs.label_mask, 0)
    log_probs = result.logits[:, :-1].log_softmax(-1).gather(2, targets[..., None])[..., 0] * outputs.label_mask
    mapping = own.config.mapping_loss_weight * result.mapping_loss
    ((log_probs.sum(1) * weights).sum() + mapping * (count * weights.abs()).sum()).backward()
    assert_same(gradients_of(model), gradients_of(own))


@pytest.mark.parametrize("base", [False, True], ids=["logits", "hidden_states"])
def test_a_loss_of_logits_or_hidden_states_trains_it_once(model, inputs, base) -> None:
    own = copy.deepcopy(model)
    outputs = own.model(**inputs, output_mapping_loss=True)
    states = outputs.last_hidden_state if base else own.lm_head(outputs.last_hidden_state)
    (states.square().mean() + own.config.mapping_loss_weight * outputs.mapping_loss).backward()
    target = model.model if base else model
    outputs = target(**inputs)
    assert outputs.mapping_loss is None
    (outputs.last_hidden_state if base else outputs.logits).square().mean().backward()
    assert_same(gradients_of(model), gradients_of(own))


def test_where_it_is_not_trained(model, inputs, labels) -> None:
    """Not in evaluation, not without gradients, and not if its weight is zero."""
    plain = copy.deepcopy(model)
    plain.config.mapping_loss_weight = 0.0
    plain(**inputs).logits.square().mean().backward()
    evaluated = model.eval()
    evaluated(**inputs).logits.square().mean().backward()
    assert_same(gradients_of(evaluated), gradients_of(plain))
    replace_forward(model.train())
    with torch.no_grad():
        assert not model(**inputs, labels=labels).log_probs.requires_grad


def test_a_head_without_log_probabilities_is_refused(model, inputs, labels) -> None:
    @dataclass
    class LossOnly(ModelOutput):
        loss: torch.Tensor | None = None

    replace_forward(model, lambda loss, **others: LossOnly(loss=loss))
    with pytest.raises(ValueError, match=r"log_probs.*mapping_loss_weight"):
        model(**inputs, labels=labels)
    model.config.mapping_loss_weight = 0.0
    assert model(**inputs, labels=labels).loss.isfinite()


def test_a_wrapped_forward_adds_nothing(model, inputs, labels, expected) -> None:
    """As accelerate wraps it for mixed precision: the model's own loss has the mapping loss already."""
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    model(**inputs, labels=labels).loss.backward()
    assert_same(gradients_of(model), expected)
