"""Other models of transformers with the tower sizes and the very language model of a FUSION model, for comparison.

Towers and projectors have random weights. The language model and the head share FUSION's tensors, so that a comparison
covers what is around them.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from workload import ONE_QUESTION, Prompt, Request, make_text

from fusion_hf import FusionConfig, FusionForConditionalGeneration
from fusion_hf.model.configuration_fusion import NUM_TILES, TILES_PER_SIDE

SHUFFLES = (3, 2)  # sides of the blocks of patches that SmolVLM makes one token of, the first that divides the grid
SEVERAL = 2  # number of images of a sample; with more than one, LLaVA-OneVision cuts none of them into tiles
VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


def build_llava_onevision(ours: FusionForConditionalGeneration) -> PreTrainedModel:
    """Build a LLaVA-OneVision that cuts an image into as many tiles as FUSION, or into none."""
    config = ours.config
    side = TILES_PER_SIDE * config.vision_config.image_size
    peer = build(
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig(
            vision_config=vision_sizes(config) | {"model_type": "siglip_vision_model", "vision_use_head": False},
            text_config=config.text_config.to_dict(),
            image_token_index=config.vision_start_token_id,
            video_token_index=config.vision_end_token_id,
            image_grid_pinpoints=[[side, side]],
            tie_word_embeddings=False,
        ),
        ours,
    )
    adopt_language_model(peer.model.language_model, peer.lm_head, ours)
    return peer


def build_smolvlm(ours: FusionForConditionalGeneration) -> PreTrainedModel:
    config = ours.config
    peer = build(
        SmolVLMForConditionalGeneration,
        SmolVLMConfig(
            vision_config=vision_sizes(config) | {"model_type": "smolvlm_vision"},
            text_config=config.text_config.to_dict(),
            image_token_id=config.vision_start_token_id,
            scale_factor=shuffle_of(config),
            tie_word_embeddings=False,
        ),
        ours,
    )
    adopt_language_model(peer.model.text_model, peer.lm_head, ours)
    return peer


def build(model_class: Any, config: Any, ours: FusionForConditionalGeneration) -> PreTrainedModel:
    """Build a peer with random weights on the device and in the dtype of `ours`. It never ends an answer early."""
    with ours.device:
        peer = model_class._from_config(config, dtype=ours.dtype, attn_implementation="sdpa")
    peer.generation_config.eos_token_id = None
    return peer.eval()


def vision_sizes(config: FusionConfig) -> dict[str, Any]:
    """Return the fields that the configurations of all towers have."""
    fields = config.vision_config.to_dict()
    return {name: fields[name] for name in VISION_SIZES}


def adopt_language_model(language_model: nn.Module, head: nn.Linear, ours: FusionForConditionalGeneration) -> None:
    """Share the tensors of FUSION's language model, without its samplers, and of its head with the peer."""
    tensors = {
        name: tensor
        for name, tensor in ours.model.language_model.state_dict(keep_vars=True).items()
        if ".vision_sampler." not in name
    }
    language_model.load_state_dict(tensors, assign=True)
    head.weight = ours.lm_head.weight


def shuffle_of(config: FusionConfig) -> int:
    """Return the side of SmolVLM's blocks of patches."""
    side = config.num_patches_per_side
    return next(block for block in SHUFFLES if side % block == 0)


def llava_onevision_tokens(config: FusionConfig, tiled: bool) -> int:
    """
    Return the number of tokens of an image: its patches and an end token, or with tiles those of the overview
    and all rows.
    """
    side = config.num_patches_per_side
    rows = TILES_PER_SIDE * side
    return side**2 + (rows * (rows + 1) if tiled else 1)


def smolvlm_tokens(config: FusionConfig) -> int:
    """Return the number of tokens of an image: those of each tile and the overview."""
    return (NUM_TILES + 1) * (config.num_patches_per_side // shuffle_of(config)) ** 2


def llava_onevision_prompt(
    config: FusionConfig, pixel_values: torch.Tensor, tiled: bool, request: Request = ONE_QUESTION
) -> Prompt:
    """
    Make inputs of `generate` with the words of FUSION's.

    Args:
        config: the configuration of FUSION.
        pixel_values (`(1, 5, 3, H, W)`): the pixels of FUSION, of which only the overview is used unless `tiled`.
    """
    prompt = peer_text(config, request, llava_onevision_tokens(config, tiled), pixel_values.device)
    # the overview comes first here
    pixels = pixel_values.roll(1, dims=1) if tiled else pixel_values[:, NUM_TILES:]
    side = config.vision_config.image_size * (TILES_PER_SIDE if tiled else 1)
    counts = torch.full((request.batch,), 1 if tiled else SEVERAL, device=pixel_values.device)
    return prompt | {
        "pixel_values": pixels.repeat(request.batch, 1, 1, 1, 1),
        "image_sizes": torch.full((request.batch, 2), side, device=pixel_values.device),
        "batch_num_images": counts,
    }


def smolvlm_prompt(config: FusionConfig, pixel_values: torch.Tensor, request: Request = ONE_QUESTION) -> Prompt:
    """Make the same inputs for SmolVLM, which reads all tiles and the overview."""
    pixels = pixel_values.repeat(request.batch, 1, 1, 1, 1)
    return peer_text(config, request, smolvlm_tokens(config), pixel_values.device) | {"pixel_values": pixels}


def peer_text(config: FusionConfig, request: Request, tokens: int, device: torch.device) -> Prompt:
    """Return an image of so many tokens and FUSION's words, `(B, S)`."""
    text = make_text(config, request, [config.vision_start_token_id] * tokens, [])
    input_ids = torch.tensor([text.ids] * request.batch, device=device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
