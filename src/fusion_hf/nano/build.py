"""`fusion-nano` before training: sizes, processor, and an initialization that allows learning from scratch."""

from dataclasses import replace
from math import pi, sqrt

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers import initialization as init

from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.model.image_processing_fusion import FusionImageProcessor
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_decoder import FusionSampler
from fusion_hf.model.modeling_fusion_vision import FusionVisionLayer, FusionVisionModel
from fusion_hf.model.processing_fusion import CHAT_FORMATS, FusionProcessor
from fusion_hf.model.turns_fusion import describe_turns

TILE_SIDE = 48  # pixels of a tile; the four tiles together have twice the side
EMBEDDING_STD = 0.3
HEAD_SCALE = 0.3
BACKGROUND = 0.9  # mean normalized value of the light backgrounds, which the patch bias maps to about zero
CHAT_FORMAT = "chatml"
POSITION_STD = 1.0  # as large as the embedding of a patch with a shape; otherwise positions are hard to learn
FINEST_WAVE = 32  # frequency of the finest position wave, relative to the coarsest


def build_processor(tokenizer: PreTrainedTokenizerFast, config: FusionConfig) -> FusionProcessor:
    """
    Build the processor. Its template has an empty system message, because the vocabulary has so few words.

    Args:
        tokenizer: Tokenizer of the model.
        config: Configuration of the model.
    """
    tokenizer.padding_side = "left"
    image_processor = FusionImageProcessor(size={"height": TILE_SIDE, "width": TILE_SIDE})
    return FusionProcessor(
        image_processor,
        tokenizer,
        chat_template=replace(CHAT_FORMATS[CHAT_FORMAT], system="").write_template(config.query_len),
        chat_format=CHAT_FORMAT,
        num_image_tokens=config.num_image_tokens,
        query_len=config.query_len,
        instruct_pad_token_id=config.instruct_pad_token_id,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> FusionConfig:
    """Build a configuration with all mechanisms of the large models and about two million parameters."""
    ids = tokenizer.convert_tokens_to_ids(["<image>", "<latent_image>", "<vision_start>", "<vision_end>"])
    config = FusionConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=TILE_SIDE,
            patch_size=8,
        ),
        image_token_id=ids[0],
        latent_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
        query_len=16,
        query_lens=[4, 16],
        window_size=2,
        sampler_layers=[0, 2],
        sampler_num_heads=4,
        instruct_pad_token_id=tokenizer.pad_token_id,
    )
    config.update(describe_turns(build_processor(tokenizer, config)))
    return config


def build_model(config: FusionConfig, seed: int) -> FusionForConditionalGeneration:
    """
    Build a model with random weights.

    Layers preserve the variance, residual outputs are small, the light background is mapped to zero, and position
    embeddings distinguish left from right.

    Args:
        config: Configuration of the model.
        seed: Seed for the weights.
    """
    torch.manual_seed(seed)
    model = FusionForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=1 / sqrt(module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=EMBEDDING_STD)
    # the head starts as the embeddings, so the model first predicts what it attends to
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    init.copy_(model.lm_head.weight, HEAD_SCALE * embeddings.weight)
    _init_tower(model.model.vision_tower)
    layers = model.model.language_model.layers
    for layer in layers:
        _shrink(layer.self_attn.o_proj, len(layers))
        _shrink(layer.mlp.down_proj, len(layers))
        if isinstance(layer.vision_sampler, FusionSampler):
            _shrink(layer.vision_sampler.linear_2, len(layers))
    return model


def _init_tower(tower: FusionVisionModel) -> None:
    patches = tower.embeddings.patch_embedding
    init.normal_(patches.weight, std=1 / sqrt(patches.weight[0].numel()))
    with torch.no_grad():
        init.copy_(patches.bias, -BACKGROUND * patches.weight.sum(dim=(1, 2, 3)))
    side = tower.embeddings.image_size // tower.embeddings.patch_size
    init.copy_(tower.embeddings.position_embedding.weight, _position_waves(side, tower.config.hidden_size))
    for layer in tower.layers:
        assert isinstance(layer, FusionVisionLayer)
        _shrink(layer.self_attn.out_proj, len(tower.layers))
        _shrink(layer.mlp.fc2, len(tower.layers))


def _position_waves(side: int, width: int) -> torch.Tensor:
    """
    Compute sines and cosines of column and row `(side * side, width)`, from a quarter of a wave per image to finer
    ones.

    Random vectors do not distinguish left from right. With them, the model learns on which line two shapes lie, but
    not their order. The coarsest waves do, because they increase from one edge to the other.
    """
    rates = pi / 2 * FINEST_WAVE ** torch.linspace(0, 1, width // 4)
    angles = torch.linspace(-0.5, 0.5, side)[:, None] * rates  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return POSITION_STD * sqrt(2) * torch.cat([columns, rows], dim=1)


def _shrink(linear: nn.Linear, num_layers: int) -> None:
    """Initialize the output of a residual branch, so that two branches per layer keep a variance of one."""
    init.normal_(linear.weight, std=1 / sqrt(linear.in_features) / sqrt(2 * num_layers))
