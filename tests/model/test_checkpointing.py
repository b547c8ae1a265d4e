"""Activation checkpointing gives the gradients of a pass without it, whatever is frozen."""

import pytest
import torch
from tests.helpers.tiny import Sample, make_inputs, tiny_config, tiny_model

from fusion_hf.training.gradient_checkpointing import enable_checkpointing

TOWER = "vision_tower"
FROZEN = {
    "nothing": lambda name: False,
    "embeddings of the tower": lambda name: TOWER in name and "embeddings" in name,
    "lower half of the tower": lambda name: TOWER in name and "layers.2." not in name and "layers.3." not in name,
    "all but the tower's upper half": lambda name: (
        not ("layers.2." in name or "layers.3." in name) or TOWER not in name
    ),
    "all but the language model's last layer": lambda name: "language_model.layers.3." not in name,
}


def gradients(frozen, reentrant=None) -> dict[str, torch.Tensor]:
    config = tiny_config()
    model = tiny_model(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    if reentrant is not None:
        enable_checkpointing(model, reentrant)
    inputs = make_inputs(config, [Sample([5, 4], [3, 4]), Sample([3], [4], image=False)])
    placeholders = [config.image_token_id, config.latent_token_id]
    inputs["labels"] = inputs["input_ids"].masked_fill(
        torch.isin(inputs["input_ids"], torch.tensor(placeholders)), -100
    )
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpoints(frozen, reentrant):
    expected = gradients(frozen)
    assert any(gradient is not None for gradient in expected.values())
    found = gradients(frozen, reentrant)
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
            continue
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
