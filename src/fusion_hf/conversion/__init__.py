"""Conversion of the authors' checkpoints, and of plain backbones, to complete Hub folders of this package's FUSION."""
