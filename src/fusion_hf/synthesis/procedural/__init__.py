"""The procedural backend, which draws all categories with exact facts, and uses templates instead of a model."""

from fusion_hf.synthesis.procedural.drawn_records import DrawnRecord, draw

__all__ = ["DrawnRecord", "draw"]
