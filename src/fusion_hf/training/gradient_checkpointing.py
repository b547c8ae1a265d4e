"""Gradient checkpointing under the name that the installed transformers uses, and PEFT's use of the deprecated
name.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

# Newer releases of transformers renamed these keys and warn about the old names, but only the old names work in all
# supported releases.
RENAMED_KEYS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def enable_checkpointing(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """
    Enable gradient checkpointing, which recomputes each layer in the backward pass instead of storing its
    activations.

    Args:
        model: the model, changed in place.
        use_reentrant: whether to use the reentrant implementation of torch.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


@contextmanager
def hide_peft_deprecation() -> Iterator[None]:
    """Hide the deprecation warning that PEFT 0.21 itself causes by reading `is_gradient_checkpointing` of a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
