"""The smallest FUSION with every mechanism, and inputs for it."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, SiglipVisionConfig

from fusion_hf import FusionConfig


VOCAB_SIZE = 99
IMAGE_ID, LATENT_ID = VOCAB_SIZE, VOCAB_SIZE + 1  # behind the vocabulary, where FusionConfig puts them
VISION_START_ID, VISION_END_ID = VOCAB_SIZE - 2, VOCAB_SIZE - 1
FIRST_TEXT_ID = 5  # smaller ids are special in some backbones' configurations
IMAGE_SIZE, PATCH_SIZE = 16, 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
QUERY_LEN = 4
TILES = 5


def tiny_config(backbone: str = "llama", tower_layers: int = 2, **kwargs: Any) -> FusionConfig:
    """A configuration with an LLM of two layers; `kwargs` go to `FusionConfig`."""
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=tower_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    defaults = {"query_len": QUERY_LEN, "query_lens": [1, 4], "window_size": 2, "sampler_layers": [0]}
    defaults |= {"sampler_num_heads": 4}
    return FusionConfig(text_config=CONFIG_MAPPING[backbone](**text), vision_config=vision, **(defaults | kwargs))


def text_ids(batch_size: int, length: int) -> torch.Tensor:
    """Random ids `(B, length)` of ordinary tokens."""
    return torch.randint(FIRST_TEXT_ID, VISION_START_ID, (batch_size, length))


def framed(batch_size: int, token_id: int, length: int) -> torch.Tensor:
    """A block `(B, length + 2)` of placeholders between its frame tokens."""
    block = torch.full((batch_size, length + 2), token_id)
    block[:, 0], block[:, -1] = VISION_START_ID, VISION_END_ID
    return block


def tiny_inputs(batch_size: int, turns: int = 1, answer: int = 0) -> dict[str, torch.Tensor]:
    """Prompts with one picture; `answer` tokens follow each of `turns` questions."""
    pieces = [text_ids(batch_size, 3), framed(batch_size, IMAGE_ID, IMAGE_TOKENS)]
    ends = []
    for _ in range(turns):
        pieces += [framed(batch_size, LATENT_ID, QUERY_LEN), text_ids(batch_size, 3)]
        ends.append(sum(piece.shape[1] for piece in pieces) - 1)
        pieces.append(text_ids(batch_size, answer))
    input_ids = torch.cat(pieces, dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.rand(batch_size, TILES, 3, IMAGE_SIZE, IMAGE_SIZE),
        "instruct_input_ids": text_ids(batch_size, 3),
        "instruct_attention_mask": torch.ones(batch_size, 3, dtype=torch.long),
        "prompt_end_positions": torch.tensor(ends).expand(batch_size, -1).clone(),
    }


@dataclass
class FusionModelTester:
    """What the common suites ask for; its attributes are their interface."""

    parent: Any
    backbone: str = "llama"
    batch_size: int = 7  # the suites compare seven samples, and would invent the missing ones
    turns: int = 2
    answer: int = 3  # the suites mask up to two tokens at either end
    is_training: bool = True

    def __post_init__(self) -> None:
        text = self.get_config().text_config
        self.num_hidden_layers = text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads
        self.hidden_size = text.hidden_size
        self.vocab_size = text.vocab_size
        self.seq_length = tiny_inputs(1, self.turns, self.answer)["input_ids"].shape[1]

    def get_config(self) -> FusionConfig:
        return tiny_config(self.backbone)

    def prepare_config_and_inputs_for_common(self) -> tuple[FusionConfig, dict[str, torch.Tensor]]:
        return self.get_config(), tiny_inputs(self.batch_size, self.turns, self.answer)
