"""fusion-nano before training: its size, its parts, and position embeddings that know left from right."""

import pytest
import torch

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_decoder import FusionSampler
from fusion_hf.nano.build import POSITION_STD, build_config, build_model
from fusion_hf.nano.word_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def model() -> FusionForConditionalGeneration:
    return build_model(build_config(build_tokenizer(["what color is the shape?", "red"])), seed=0)


def test_every_mechanism_at_a_small_size(model: FusionForConditionalGeneration) -> None:
    config = model.config
    assert model.num_parameters() <= 6_000_000
    assert len(config.query_lens) > 1 and config.query_len in config.query_lens and config.mapping_loss_weight > 0
    assert 0 < config.vision_early_layers < config.vision_config.num_hidden_layers
    assert sum(isinstance(module, FusionSampler) for module in model.modules()) == len(config.sampler_layers) > 1


def test_positions_know_left_from_right_and_above_from_below(model: FusionForConditionalGeneration) -> None:
    side, width = model.config.num_patches_per_side, model.config.vision_config.hidden_size
    positions = model.model.vision_tower.embeddings.position_embedding.weight.detach().view(side, side, width)
    columns, rows = positions[..., : width // 2], positions[..., width // 2 :]
    assert torch.equal(columns, columns[:1].expand_as(columns))  # the same in every row
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert (columns[0, 1:, 0] > columns[0, :-1, 0]).all()  # the coarsest wave grows from left to right
    assert (rows[1:, 0, 0] > rows[:-1, 0, 0]).all()
    distances = torch.cdist(positions.flatten(0, 1), positions.flatten(0, 1)) + torch.eye(side**2) * width
    assert distances.min() > POSITION_STD  # no two patches look alike


def test_a_seed_is_a_model() -> None:
    config = build_config(build_tokenizer(["red"]))
    first, again, other = (build_model(config, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
