"""The six family configs build models of exactly the published sizes.

The expected numbers are derived here from the sizes of the paper's backbones (FUSION paper, arXiv 2504.09925) and from
the structure of each part; nothing is read from the configs, so that a wrong size there cannot agree with itself.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fusion_hf import FusionConfig, FusionForConditionalGeneration

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
NUM_SAMPLERS = 10
SAMPLER_LAYERS = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]


@dataclass(frozen=True)
class Text:
    """Sizes of a language model; `vocab` includes the two rows for `<vision_start>` and `<vision_end>`."""

    model_type: str
    vocab: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Vision:
    """Sizes of a SigLIP tower; `layers` are those of the published tower, whose last one is removed."""

    width: int
    mlp: int
    layers: int
    patch: int
    patches_per_side: int
    early_layers: int


PHI = Text("phi3", vocab=32_013, width=3072, mlp=8192, layers=32, heads=32, kv_heads=32)
LLAMA = Text("llama", vocab=128_258, width=4096, mlp=14_336, layers=32, heads=32, kv_heads=8)
SO400M = Vision(width=1152, mlp=4304, layers=27, patch=14, patches_per_side=27, early_layers=13)
GIANT = Vision(width=1536, mlp=6144, layers=40, patch=16, patches_per_side=24, early_layers=19)

# name -> (language model, tower, side of the reduced grid of FUSION-L, image tokens)
FAMILY = {
    "fusion-3b": (PHI, SO400M, None, 729),
    "fusion-x-3b": (PHI, GIANT, None, 576),
    "fusion-l-3b": (PHI, SO400M, 16, 256),
    "fusion-8b": (LLAMA, SO400M, None, 729),
    "fusion-x-8b": (LLAMA, GIANT, None, 576),
    "fusion-l-8b": (LLAMA, SO400M, 16, 256),
}


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def layer_norm(width: int) -> int:
    return 2 * width


def count_tower(vision: Vision) -> int:
    """Patch and position embeddings and all layers but the last; no class token, no pooling head, no final norm."""
    embeddings = linear(3 * vision.patch**2, vision.width) + vision.patches_per_side**2 * vision.width
    attention = 4 * linear(vision.width, vision.width)
    mlp = linear(vision.width, vision.mlp) + linear(vision.mlp, vision.width)
    return embeddings + (vision.layers - 1) * (attention + mlp + 2 * layer_norm(vision.width))


def count_language_model(text: Text) -> int:
    """Embeddings, layers (grouped-query attention, gated MLP, two RMS norms, no biases) and the final RMS norm."""
    kv_width = text.kv_heads * (text.width // text.heads)
    attention = 2 * linear(text.width, text.width, bias=False) + 2 * linear(text.width, kv_width, bias=False)
    mlp = 3 * linear(text.width, text.mlp, bias=False)
    return text.vocab * text.width + text.layers * (attention + mlp + 2 * text.width) + text.width


def count_sampler(width: int) -> int:
    """`proj_in` (2D -> D), `proj_context`, q, k, v and o projections, the two MLP layers, and four LayerNorms."""
    square = linear(width, width, bias=False)
    return linear(2 * width, width, bias=False) + square + 4 * square + 2 * square + 4 * layer_norm(width)


def expected_counts(text: Text, vision: Vision) -> dict[str, int]:
    return {
        "vision_tower": count_tower(vision),
        "vision_projector": linear(3 * vision.width, text.width) + linear(text.width, text.width),
        "vision_projector_back": linear(text.width, vision.width) + linear(vision.width, vision.width),
        "language_model": count_language_model(text),
        "samplers": NUM_SAMPLERS * count_sampler(text.width),
        "lm_head": linear(text.width, text.vocab, bias=False),
    }


def part_of(name: str) -> str:
    """The part that a parameter belongs to, from its name."""
    if ".vision_sampler." in name:
        return "samplers"
    return name.removeprefix("model.").split(".")[0]


def load_config(name: str) -> FusionConfig:
    return FusionConfig.from_pretrained(CONFIGS / f"{name}.json")


def test_every_config_file_is_covered():
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == sorted(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_parameter_counts(name: str):
    text, vision, _, _ = FAMILY[name]
    with torch.device("meta"):
        model = FusionForConditionalGeneration(load_config(name))

    counts: Counter[str] = Counter()
    for parameter_name, parameter in model.named_parameters():
        counts[part_of(parameter_name)] += parameter.numel()

    assert dict(counts) == expected_counts(text, vision)


@pytest.mark.parametrize("name", FAMILY)
def test_sampler_positions(name: str):
    with torch.device("meta"):
        model = FusionForConditionalGeneration(load_config(name))
    names = [key for key in model.state_dict() if key.endswith(".vision_sampler.proj_in.weight")]
    assert [int(key.split(".")[3]) for key in names] == SAMPLER_LAYERS


@pytest.mark.parametrize("name", FAMILY)
def test_fields(name: str):
    text, vision, grid, image_tokens = FAMILY[name]
    config = load_config(name)

    assert config.text_config.model_type == text.model_type
    assert config.vision_config.num_hidden_layers == vision.layers - 1
    assert config.vision_early_layers == vision.early_layers
    assert config.image_token_grid == grid
    assert config.num_image_tokens == image_tokens
    assert config.query_lens == [4, 16, 36, 64, 144]
    assert config.query_len in config.query_lens
    # The two added rows are the last of the vocabulary; the marks that features replace have no row.
    assert (config.vision_start_token_id, config.vision_end_token_id) == (text.vocab - 2, text.vocab - 1)
    assert (config.image_token_id, config.latent_token_id) == (text.vocab, text.vocab + 1)


@pytest.mark.parametrize("name", FAMILY)
def test_survives_saving(name: str, tmp_path: Path):
    config = load_config(name)
    config.save_pretrained(tmp_path)
    assert FusionConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("size", ["3b", "8b"])
def test_fusion_l_differs_by_its_grid_alone(size: str):
    full, reduced = load_config(f"fusion-{size}").to_dict(), load_config(f"fusion-l-{size}").to_dict()
    assert {key for key in full if full[key] != reduced[key]} == {"image_token_grid"}
