"""Training FUSION with `transformers.Trainer`."""

from fusion_hf.training.collator import FusionDataCollator

__all__ = ["FusionDataCollator"]
