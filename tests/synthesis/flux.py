"""A tiny Flux with random weights and a vocabulary of letters, saved as diffusers saves any pipeline."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'"
WIDTH = 32  # of the text encoders
SEED = 0


def make_clip_tokenizer() -> CLIPTokenizer:
    ends = [f"{letter}</w>" for letter in LETTERS]
    words = [*LETTERS, *ends, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


def make_t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def make_flux() -> FluxPipeline:
    """With everything that the large one has, in a few thousand parameters."""
    torch.manual_seed(SEED)
    clip, t5 = make_clip_tokenizer(), make_t5_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        projection_dim=WIDTH, max_position_embeddings=77, bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    long_text = T5Config(vocab_size=len(t5), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1, latent_channels=1,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(long_text),
        tokenizer_2=t5,
        transformer=transformer,
    )


def save_flux(folder: Path) -> Path:
    """Save one; returns its folder."""
    make_flux().save_pretrained(folder)
    return folder
