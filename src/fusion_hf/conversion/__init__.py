"""The authors' checkpoints, and plain backbones, to complete Hub folders of this package's FUSION."""
