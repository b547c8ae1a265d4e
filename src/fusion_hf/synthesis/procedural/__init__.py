"""The procedural backend: all categories drawn by the project, with exact facts and templates in place of a model."""

from fusion_hf.synthesis.procedural.draw import Drawn, draw

__all__ = ["Drawn", "draw"]
