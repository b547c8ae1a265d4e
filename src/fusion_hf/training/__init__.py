"""Train FUSION models with `transformers.Trainer`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_hf.data import load_records
    from fusion_hf.training.arguments import FusionTrainingArguments
    from fusion_hf.training.collator import FusionDataCollator
    from fusion_hf.training.trainer import FusionTrainer

__all__ = ["FusionDataCollator", "FusionTrainer", "FusionTrainingArguments", "load_records"]

# These names need torch or the extra `train`, and take seconds to import.
_MODULES = {
    "FusionDataCollator": "fusion_hf.training.collator",
    "FusionTrainer": "fusion_hf.training.trainer",
    "FusionTrainingArguments": "fusion_hf.training.arguments",
    "load_records": "fusion_hf.data",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
