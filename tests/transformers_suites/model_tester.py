"""The smallest FUSION with every mechanism, and inputs for it."""

from dataclasses import dataclass
from typing import Any

import torch
from tests.helpers.tiny import QUERY_LEN, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_hf import FusionConfig, FusionImageProcessor

VOCAB_SIZE = 99
VISION_START_ID, VISION_END_ID = VOCAB_SIZE - 2, VOCAB_SIZE - 1
FIRST_TEXT_ID = 5  # smaller ids are special in the backbone's configuration, or the placeholders
LAST_TEXT_ID = VOCAB_SIZE - 16  # the suites cut 15 ids off
BEHIND_VOCAB = (VOCAB_SIZE, VOCAB_SIZE + 1)  # image and latent placeholder where FusionConfig puts them
SMALL_IDS = (3, 4)
IMAGE_SIZE, PATCH_SIZE = 16, 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
TILES = 5


def suite_config(backbone: str = "llama", **changes: Any) -> FusionConfig:
    """A configuration with two layers in the LLM and in the tower; `changes` go to `FusionConfig`."""
    text = {"vocab_size": VOCAB_SIZE, "intermediate_size": 37, "num_hidden_layers": 2}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    return tiny_config(backbone, text, vision, **{"sampler_layers": [0]} | changes)


def text_ids(batch_size: int, length: int) -> torch.Tensor:
    """Random ids `(B, length)` of ordinary tokens."""
    return torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID + 1, (batch_size, length))


def framed(batch_size: int, token_id: int, length: int) -> torch.Tensor:
    """A block `(B, length + 2)` of placeholders between its frame tokens."""
    block = torch.full((batch_size, length + 2), token_id)
    block[:, 0], block[:, -1] = VISION_START_ID, VISION_END_ID
    return block


def suite_inputs(
    batch_size: int, turns: int = 1, answer: int = 0, placeholders: tuple[int, int] = BEHIND_VOCAB
) -> dict[str, torch.Tensor]:
    """Prompts with one image; `answer` tokens follow each of `turns` questions."""
    image_id, latent_id = placeholders
    pieces = [text_ids(batch_size, 3), framed(batch_size, image_id, IMAGE_TOKENS)]
    ends = []
    for _ in range(turns):
        pieces += [framed(batch_size, latent_id, QUERY_LEN), text_ids(batch_size, 3)]
        ends.append(sum(piece.shape[1] for piece in pieces) - 1)
        pieces.append(text_ids(batch_size, answer))
    return {
        **text_inputs(torch.cat(pieces, dim=1)),
        "pixel_values": torch.rand(batch_size, TILES, 3, IMAGE_SIZE, IMAGE_SIZE),
        "instruct_input_ids": text_ids(batch_size, 3),
        "instruct_attention_mask": torch.ones(batch_size, 3, dtype=torch.long),
        "prompt_end_positions": torch.tensor(ends).expand(batch_size, -1).clone(),
    }


def text_inputs(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ids and a mask that masks nothing."""
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and the special tokens of a ChatML backbone and of FUSION."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left"
    )
    marks = ["<|im_start|>", "<vision_start>", "<vision_end>", "<image>", "<latent_image>"]
    fast.add_tokens(marks, special_tokens=True)
    return fast


def suite_image_processor() -> FusionImageProcessor:
    return FusionImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


@dataclass
class FusionModelTester:
    """What the common suites ask for; its attributes are their interface."""

    parent: Any
    backbone: str = "llama"
    placeholders: tuple[int, int] = BEHIND_VOCAB
    text_only: bool = False
    batch_size: int = 7  # the suites compare seven samples, and would invent the missing ones
    turns: int = 2
    answer: int = 3  # the suites mask up to two tokens at either end
    is_training: bool = True

    def __post_init__(self) -> None:
        config, inputs = self.prepare_config_and_inputs_for_common()
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.hidden_size = config.text_config.hidden_size
        self.vocab_size = config.text_config.vocab_size
        self.seq_length = inputs["input_ids"].shape[1]

    def get_config(self) -> FusionConfig:
        image_id, latent_id = self.placeholders
        return suite_config(self.backbone, image_token_id=image_id, latent_token_id=latent_id)

    def prepare_config_and_inputs_for_common(self) -> tuple[FusionConfig, dict[str, torch.Tensor]]:
        if self.text_only:
            return self.get_config(), text_inputs(text_ids(self.batch_size, 11))
        return self.get_config(), suite_inputs(self.batch_size, self.turns, self.answer, self.placeholders)
