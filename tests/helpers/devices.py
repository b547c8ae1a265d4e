"""Where tests compute: on the CPU, and where `make test-gpu` runs them, on a GPU as well."""

from collections.abc import Mapping

import pytest
import torch

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def move(inputs: Mapping[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """A batch on another device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}
