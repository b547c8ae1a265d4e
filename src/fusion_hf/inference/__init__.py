"""Inference: chat models and conversations, batches of questions, and compiled generation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_hf.hub.folders import nano_path
    from fusion_hf.inference.chat_model import Assistant, ChatModel, question_message
    from fusion_hf.inference.conversation import Conversation
    from fusion_hf.inference.devices import choose_device, choose_dtype
    from fusion_hf.inference.image_features import ImageFeatures
    from fusion_hf.inference.sampling_options import SamplingOptions

__all__ = [
    "Assistant",
    "ChatModel",
    "Conversation",
    "ImageFeatures",
    "SamplingOptions",
    "choose_device",
    "choose_dtype",
    "nano_path",
    "question_message",
]

_MODULES = {
    "Assistant": "fusion_hf.inference.chat_model",
    "ChatModel": "fusion_hf.inference.chat_model",
    "Conversation": "fusion_hf.inference.conversation",
    "ImageFeatures": "fusion_hf.inference.image_features",
    "SamplingOptions": "fusion_hf.inference.sampling_options",
    "choose_device": "fusion_hf.inference.devices",
    "choose_dtype": "fusion_hf.inference.devices",
    "nano_path": "fusion_hf.hub.folders",
    "question_message": "fusion_hf.inference.chat_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # most of these names import torch, which takes seconds and which other modules of this folder do not need
    return getattr(import_module(_MODULES[name]), name)
