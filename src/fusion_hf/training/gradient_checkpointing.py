"""Activation checkpointing, by the name that the installed transformers gives it, and PEFT's use of the older name."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

# Newer releases of transformers call these keys otherwise and warn of the older name, which is the only one that all
# supported releases know.
RENAMED_KEYS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def enable_checkpointing(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Compute each layer a second time in the backward pass, so that what is inside of it need not be kept."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


@contextmanager
def hide_peft_deprecation() -> Iterator[None]:
    """Hide the warning that PEFT 0.21 causes, not its user: it reads a model's `is_gradient_checkpointing`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
