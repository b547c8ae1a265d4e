"""Asking a model: chat models and conversations, batches of questions, compiled generation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_hf.hub.folders import nano_path
    from fusion_hf.inference.chat_model import (
        Assistant,
        Conversation,
        SeenPicture,
        choose_device,
        choose_dtype,
        question_message,
    )

__all__ = [
    "Assistant",
    "Conversation",
    "SeenPicture",
    "choose_device",
    "choose_dtype",
    "nano_path",
    "question_message",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # which takes torch, and seconds to import: other modules of the folder need neither
    return getattr(import_module("fusion_hf.inference.chat_model"), name)
