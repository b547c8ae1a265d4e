"""Tiny FUSION models of every backbone, and prompts for them, without a tokenizer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, SiglipVisionConfig

from fusion_hf import FusionConfig, FusionForConditionalGeneration

VOCABULARY = 60
BACKBONES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
QUERY_LEN = 4


def tiny_config(
    backbone: str = "llama", text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **changes: Any
) -> FusionConfig:
    """
    Four LLM layers, two samplers, a tower of four layers over 16 patches.

    Args:
        text: what differs in the language model.
        vision: what differs in the tower.
        changes: what differs in the rest.
    """
    text_values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if backbone == "qwen3":
        text_values["head_dim"] = 8
    vision_values: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    values: dict[str, Any] = {
        "query_len": QUERY_LEN,
        "query_lens": [1, 4],
        "window_size": 2,
        "sampler_layers": [0, 2],
        "sampler_num_heads": 4,
    }
    return FusionConfig(
        text_config=CONFIG_MAPPING[backbone](**text_values | (text or {})),
        vision_config=SiglipVisionConfig(**vision_values | (vision or {})),
        **values | changes,
    )


def tiny_model(config: FusionConfig, seed: int = 0, scale: float = 4.0) -> FusionForConditionalGeneration:
    """A model whose weights are large enough for its parts to matter in the logits; `scale` 1 leaves them."""
    torch.manual_seed(seed)
    model = FusionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_tower" not in name:
                parameter.mul_(scale)
    return model


@dataclass
class Sample:
    """One conversation: questions as numbers of text tokens, answers between them; with or without an image."""

    questions: list[int] = field(default_factory=lambda: [5])
    answers: list[int] = field(default_factory=list)
    image: bool = True
    seed: int = 0


def make_inputs(
    config: FusionConfig, samples: list[Sample], query_len: int = QUERY_LEN, padding_side: str = "right"
) -> dict[str, Any]:
    """A padded batch as [`FusionProcessor`] makes them."""
    rows, ends, instructs, images = [], [], [], []
    for sample in samples:
        row, row_ends, instruct = _make_row(config, sample, query_len)
        rows.append(row)
        ends.append(row_ends)
        instructs.append(instruct if sample.image else [config.instruct_pad_token_id])
        size = config.vision_config.image_size
        generator = torch.Generator().manual_seed(1000 + sample.seed)
        image = torch.randn(5, 3, size, size, generator=generator)
        images.append(image if sample.image else torch.zeros_like(image))
    longest, longest_instruct = max(map(len, rows)), max(map(len, instructs))
    most_turns = max(map(len, ends))
    left = padding_side == "left"
    pads = [longest - len(row) for row in rows]
    ids = [[0] * pad + row if left else row + [0] * pad for row, pad in zip(rows, pads, strict=True)]
    mask = [
        [0] * pad + [1] * len(row) if left else [1] * len(row) + [0] * pad for row, pad in zip(rows, pads, strict=True)
    ]
    shifted = [
        [end + pad * left for end in row] + [-1] * (most_turns - len(row)) for row, pad in zip(ends, pads, strict=True)
    ]
    instruct_ids = torch.tensor([row + [0] * (longest_instruct - len(row)) for row in instructs])
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "instruct_input_ids": instruct_ids,
        "instruct_attention_mask": (instruct_ids != 0).long(),
        "prompt_end_positions": torch.tensor(shifted),
        "query_len": query_len,
    }
    if any(sample.image for sample in samples):
        inputs["pixel_values"] = torch.stack(images)
    return inputs


def _make_row(config: FusionConfig, sample: Sample, query_len: int) -> tuple[list[int], list[int], list[int]]:
    generator = torch.Generator().manual_seed(sample.seed)

    def text(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY - 2, (length,), generator=generator).tolist()

    def block(token: int, length: int) -> list[int]:
        return [config.vision_start_token_id, *[token] * length, config.vision_end_token_id]

    row, ends, instruct = [1, *text(3)], [], []
    if sample.image:
        row += block(config.image_token_id, config.num_image_tokens)
    for turn, length in enumerate(sample.questions):
        question = text(length)
        instruct += question
        row += [*block(config.latent_token_id, query_len), *question, *text(2)]
        ends.append(len(row) - 1)
        if turn < len(sample.answers):
            row += text(sample.answers[turn])
    return row, ends, instruct
