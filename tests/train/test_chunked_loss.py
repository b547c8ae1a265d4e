"""The loss over labelled tokens alone, some at a time, and the tower's tiles some at a time, beside the whole."""

from typing import Any

import pytest
import torch
from tests.helpers.tiny import BACKBONES, VOCABULARY, Sample, make_inputs, tiny_config, tiny_model

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.model import modeling_fusion_base, modeling_fusion_vision
from fusion_hf.model.modeling_fusion_base import LossCounts
from fusion_hf.training.collator import find_loss_positions
from fusion_hf.training.gradient_checkpointing import enable_checkpointing

CHUNK = 3  # labelled tokens at a time
SAMPLES = [Sample([5, 4], [3, 4], seed=1), Sample([3], [4], image=False, seed=2), Sample([6], [9], seed=3)]
EXACT = {"rtol": 1e-4, "atol": 1e-6}


def labelled(model: FusionForConditionalGeneration, samples: list[Sample] = SAMPLES) -> dict[str, Any]:
    """A mixed batch, with labels behind the last question of each row, placeholders among them."""
    inputs = make_inputs(model.config, samples)
    positions = torch.arange(inputs["input_ids"].shape[1])
    is_answer = positions > inputs["prompt_end_positions"].amax(1, keepdim=True)
    inputs["labels"] = torch.where(is_answer & inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    return inputs


def differentiate(model: FusionForConditionalGeneration, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Outputs and gradients of a training pass."""
    model.train().zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.fixture
def head_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of a language head, with a few at a time."""
    monkeypatch.setattr(modeling_fusion_base, "LOGITS_PER_CHUNK", CHUNK * VOCABULARY)
    rows: list[int] = []
    forward = torch.nn.Linear.forward

    def counting(self: torch.nn.Linear, values: torch.Tensor) -> torch.Tensor:
        if self.out_features == VOCABULARY:
            rows.append(values.shape[:-1].numel())
        return forward(self, values)

    monkeypatch.setattr(torch.nn.Linear, "forward", counting)
    return rows


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("counted", [False, True], ids=["batch", "part of a step"])
def test_chunks_have_the_loss_and_the_gradient_of_all_logits(
    head_rows: list[int], backbone: str, counted: bool
) -> None:
    model = tiny_model(tiny_config(backbone))
    inputs = labelled(model)
    counts = LossCounts(torch.tensor(40.0), torch.tensor(50.0), torch.tensor(7.0)) if counted else None
    expected, gradients = differentiate(model, **inputs, loss_counts=counts)
    assert head_rows == [inputs["labels"].numel()]
    head_rows.clear()

    positions = find_loss_positions(inputs["labels"])
    found, chunked = differentiate(model, **inputs, loss_counts=counts, loss_positions=positions)
    assert found.logits is None
    assert max(head_rows) <= CHUNK
    num_chunks = -(-len(positions) // CHUNK)
    assert num_chunks > 2
    assert sum(rows > 0 for rows in head_rows) == 2 * num_chunks - 1, "the last chunk is not computed again"
    for name in ("loss", "language_loss", "mapping_loss"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
    assert chunked.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked[name], gradient, **EXACT, msg=name)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_on_the_right_needs_no_mask(backbone: str) -> None:
    """As `FusionTrainer` has it in compact batches."""
    model = tiny_model(tiny_config(backbone))
    inputs = labelled(model)
    assert not inputs["attention_mask"].all()
    expected, gradients = differentiate(model, **inputs, check_inputs=False)
    found, without = differentiate(model, **{**inputs, "attention_mask": None}, check_inputs=False)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(without[name], gradient, **EXACT, msg=name)


def test_a_part_without_labels_has_a_gradient_of_zeros_everywhere() -> None:
    """Processes wait for the gradient of each other's weights."""
    model = tiny_model(tiny_config())
    inputs = labelled(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    counts = LossCounts(torch.tensor(40.0), torch.tensor(50.0), torch.tensor(7.0))
    positions = find_loss_positions(inputs["labels"])
    outputs, gradients = differentiate(model, **inputs, loss_counts=counts, loss_positions=positions)
    assert outputs.language_loss == 0
    assert gradients["lm_head.weight"].count_nonzero() == 0
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_tiles_some_at_a_time_have_the_gradient_of_all(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    model = tiny_model(tiny_config())
    inputs = labelled(model, SAMPLES[::2])
    expected, gradients = differentiate(model, **inputs)
    enable_checkpointing(model, reentrant)
    seen: list[int] = []
    layer = modeling_fusion_vision.FusionVisionLayer
    call = layer.__call__

    def counting(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(hidden_states))
        return call(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "__call__", counting)
    found, split = differentiate(model, **inputs)
    layers, images = len(model.model.vision_tower.layers), len(inputs["pixel_values"])
    parts = -(-4 * images // modeling_fusion_vision.TILES_AT_A_TIME)
    # beside each layer's call for the overviews
    assert sorted(seen)[-layers * parts :] == [modeling_fusion_vision.TILES_AT_A_TIME] * (layers * parts)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(split[name], gradient, **EXACT, msg=name)

    model.model.vision_tower.splits_on_cpu = False
    seen.clear()
    differentiate(model, **inputs)
    assert max(seen) == 4 * images
