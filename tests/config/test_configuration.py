"""Impossible configurations: the error names the field, the value and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.tiny import tiny_config

from fusion_hf import FusionConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_len": 8}, r"query_len.*a perfect square.*got 8"),
        ({"query_lens": [4, 7]}, r"query_lens.*perfect squares.*got \[4, 7\]"),
        ({"query_lens": []}, r"query_lens.*at least one.*got \[\]"),
        ({"window_size": 0}, r"window_size.*at least 1.*got 0"),
        ({"sampler_layers": [0, 4]}, r"sampler_layers.*layers of the language model .0 to 3.*got \[0, 4\]"),
        ({"sampler_layers": [1, 1]}, r"sampler_layers.*without duplicates.*got \[1, 1\]"),
        ({"sampler_num_heads": 5}, r"sampler_num_heads.*a divisor of the language model's hidden size 32.*got 5"),
        ({"vision_early_layers": 3}, r"vision_early_layers.*1 to 2.*got 3"),
        ({"early_text_attention": "none"}, r"early_text_attention.*'uniform', 'uniform_padded'.*got 'none'"),
        ({"image_token_grid": 5}, r"image_token_grid.*None or from 1 to 4.*got 5"),
        ({"mapping_loss_weight": -1.0}, r"mapping_loss_weight.*0 or more.*got -1.0"),
        ({"vision_config": {"model_type": "nothing"}}, r"vision_config.model_type.*got 'nothing'"),
    ],
)
def test_impossible_values(changes: dict[str, Any], message: str) -> None:
    values = tiny_config().to_dict() | changes
    with pytest.raises(ValueError, match=message):
        FusionConfig(**values)


def test_impossible_arguments_of_from_pretrained(tmp_path: Path) -> None:
    """Which replace what is in the file after it is checked."""
    tiny_config().save_pretrained(tmp_path)
    assert FusionConfig.from_pretrained(tmp_path, image_token_grid=2).num_image_tokens == 4
    with pytest.raises(ValueError, match=r"image_token_grid.*None or from 1 to 4.*got 5"):
        FusionConfig.from_pretrained(tmp_path, image_token_grid=5, return_unused_kwargs=True)


def test_derived_defaults() -> None:
    config = FusionConfig(text_config={"model_type": "llama", "vocab_size": 100, "num_hidden_layers": 8})
    assert (config.image_token_id, config.latent_token_id) == (100, 101)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (98, 99)
    assert config.sampler_layers == [0, 3, 6] and config.vision_early_layers == 13
    assert config.num_image_tokens == 729
    assert FusionConfig(image_token_grid=16).num_image_tokens == 256


def test_round_trip() -> None:
    config = tiny_config("phi3", image_token_grid=2)
    assert FusionConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
