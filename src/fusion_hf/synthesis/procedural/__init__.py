"""The procedural backend: all categories drawn by the project, with exact facts and templates in place of a model."""

from fusion_hf.synthesis.procedural.drawn_records import DrawnRecord, draw

__all__ = ["DrawnRecord", "draw"]
