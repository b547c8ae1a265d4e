"""Gradients of a training step, and their comparison with those of a pass by hand."""

from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback

Gradients = dict[str, torch.Tensor]
SMALLEST_SHARE = 0.01  # of the norm of all gradients; a weight's smaller gradient is compared with this


def gradients_of(model: torch.nn.Module) -> Gradients:
    """Copies of the gradients, by the names of their weights."""
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    assert set(actual) == set(expected)
    smallest = SMALLEST_SHARE * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm()
        assert difference <= tolerance * max(gradient.norm(), smallest), (name, float(difference))


@dataclass
class KeepGradients(TrainerCallback):
    """Keeps the gradients that the optimizer gets."""

    gradients: Gradients = field(default_factory=dict)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients_of(model)
