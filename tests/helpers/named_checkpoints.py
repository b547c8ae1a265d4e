"""Checkpoints in the authors' layout that load by their name: with a tokenizer, and a tower on disk."""

from pathlib import Path
from typing import Any

from tests.helpers.checkpoints import (
    TOWER,
    checkpoint_shapes,
    random_tensors,
    save_weights,
    upstream_config,
    write_json,
)
from tests.helpers.tokenizers import write_phi3_tokenizer

ROWS = 32_013  # of the embedding: Phi-3's tokens and two marks
SCALE = 0.05  # of the weights, so that activations stay small


def write_named_checkpoint(
    folder: Path,
    num_shards: int = 2,
    suffix: str = ".safetensors",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A full checkpoint like FUSION 3B's, only smaller; `folder.parent / "siglip-tower"` holds its tower's sizes."""
    tower = folder.parent / "siglip-tower"
    write_json(tower / "config.json", TOWER)
    config = upstream_config(**{"vocab_size": ROWS, "mm_vision_tower": str(tower)} | changes)
    write_json(folder / "config.json", config)
    tensors = random_tensors(checkpoint_shapes(config), seed)
    save_weights(folder, {name: tensor * SCALE for name, tensor in tensors.items()}, num_shards, suffix)
    return write_phi3_tokenizer(folder)
