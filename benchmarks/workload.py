"""The workload of the benchmarks: a middle-sized FUSION model with random weights, a prompt, a photo, and training
batches.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage.data
import torch
from PIL import Image
from transformers import LlamaConfig, SiglipVisionConfig

from fusion_hf import FusionConfig, FusionForConditionalGeneration, FusionImageProcessor
from fusion_hf.model.configuration_fusion import NUM_TILES
from fusion_hf.training.collator import IGNORE_INDEX

SEED = 0
FIRST_ORDINARY_ID = 3  # lower ids are special tokens of the backbone
SYSTEM_TOKENS, QUESTION_TOKENS, HEADER_TOKENS, ANSWER_TOKENS = 12, 20, 4, 20
SHALLOW = 2  # number of layers where only the widths matter
LONGEST_SEQUENCE = 8192  # maximum number of tokens in the language model's configuration
RELEASED = Path(__file__).parents[1] / "configs" / "models"

Prompt = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """
    The sizes of a benchmark, with lengths in tokens and sides in pixels.

    `vision_layers` counts the tower layers that run. `released` is the published model with these sizes, whose
    configuration is used.
    """

    vision_layers: int
    vision_early_layers: int
    vision_width: int
    vision_heads: int
    vision_mlp: int
    image_side: int
    patch_side: int
    text_layers: int
    text_width: int
    text_heads: int
    text_mlp: int
    vocab_size: int
    sampler_layers: tuple[int, ...]
    query_len: int
    window_size: int
    new_tokens: int  # number of tokens generated per repeat; all but the first are timed as decoding
    many_turns: int  # number of turns in the conversation for timing the samplers
    photo: tuple[int, int]  # width, height
    matrix_side: int  # side of the square matrices whose product gives the machine's rate
    copied_bytes: int  # bytes of the copy that gives the machine's memory bandwidth, and of the read
    released: str | None = None


SIZES = {
    "middle": Size(
        vision_layers=27,
        vision_early_layers=13,
        vision_width=384,
        vision_heads=6,
        vision_mlp=1536,
        image_side=384,
        patch_side=14,
        text_layers=12,
        text_width=512,
        text_heads=8,
        text_mlp=1408,
        vocab_size=32000,
        sampler_layers=(0, 3, 6, 9),
        query_len=36,
        window_size=3,
        new_tokens=33,
        many_turns=8,
        photo=(4000, 3000),
        matrix_side=2048,
        copied_bytes=2**28,
    ),
    # for tests: covers every mechanism, but the times have no meaning
    "tiny": Size(
        vision_layers=5,
        vision_early_layers=2,
        vision_width=32,
        vision_heads=2,
        vision_mlp=64,
        image_side=56,
        patch_side=14,
        text_layers=3,
        text_width=64,
        text_heads=4,
        text_mlp=128,  # 4 bits of bitsandbytes need blocks of 64
        vocab_size=128,
        sampler_layers=(0, 2),
        query_len=4,
        window_size=2,
        new_tokens=3,
        many_turns=2,
        photo=(120, 90),
        matrix_side=64,
        copied_bytes=2**16,
    ),
}
# the middle size with a third of its layers
SIZES["short"] = replace(SIZES["middle"], vision_layers=9, vision_early_layers=4, text_layers=4, sampler_layers=(0, 3))


def read_config(name: str) -> FusionConfig:
    """Read the configuration of a published model."""
    return FusionConfig(**json.loads((RELEASED / f"{name}.json").read_text()))


def released_size(name: str) -> Size:
    """Return the sizes of a published model, which are large enough to use an accelerator fully."""
    config = read_config(name)
    text, vision = config.text_config, config.vision_config
    return replace(
        SIZES["middle"],
        vision_layers=vision.num_hidden_layers,
        vision_early_layers=config.vision_early_layers,
        vision_width=vision.hidden_size,
        vision_heads=vision.num_attention_heads,
        vision_mlp=vision.intermediate_size,
        image_side=vision.image_size,
        patch_side=vision.patch_size,
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        text_heads=text.num_attention_heads,
        text_mlp=text.intermediate_size,
        vocab_size=text.vocab_size,
        sampler_layers=tuple(config.sampler_layers),
        query_len=config.query_len,
        window_size=config.window_size,
        matrix_side=8192,
        copied_bytes=2**31,
        released=name,
    )


SIZES |= {"3b": released_size("fusion-3b"), "8b": released_size("fusion-8b")}


def build_config(size: Size) -> FusionConfig:
    """Return the configuration of a FUSION model over a Llama-type language model, or of a published model."""
    if size.released is not None:
        return read_config(size.released)
    text = LlamaConfig(
        hidden_size=size.text_width,
        intermediate_size=size.text_mlp,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        vocab_size=size.vocab_size,
        max_position_embeddings=LONGEST_SEQUENCE,
    )
    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image_side,
        patch_size=size.patch_side,
    )
    return FusionConfig(
        text_config=text,
        vision_config=vision,
        vision_early_layers=size.vision_early_layers,
        sampler_layers=list(size.sampler_layers),
        query_len=size.query_len,
        query_lens=[size.query_len],
        window_size=size.window_size,
    )


def make_shallow(make_config: Callable[[], FusionConfig]) -> FusionConfig:
    """
    Return the same widths with `SHALLOW` layers in the tower and the language model, and one sampler in the
    first layer.
    """
    values = make_config().to_dict()
    for part in ("text_config", "vision_config"):
        values[part] = {**values[part], "num_hidden_layers": SHALLOW}
        values[part].pop("layer_types", None)  # one for each layer
    return FusionConfig(**values | {"vision_early_layers": SHALLOW // 2, "sampler_layers": [0]})


@dataclass(frozen=True)
class TrainingSize:
    """
    The sizes of a training step and a data loader.

    `image` is the width and height of the JPEGs in pixels. One pass of the loader reads `records`, with `loaded` of
    them per batch.
    """

    config: Callable[[], FusionConfig]
    batch: int = 2
    turns: int = 2
    query_len: int = 36
    image: tuple[int, int] = (1152, 864)  # one megapixel
    records: int = 96
    loaded: int = 8
    matrix_side: int = 2048


TRAINING_SIZES = {
    "middle": TrainingSize(partial(build_config, SIZES["middle"])),
    "3b": TrainingSize(partial(read_config, "fusion-3b"), matrix_side=8192),
    "8b": TrainingSize(partial(read_config, "fusion-8b"), matrix_side=8192),
    "tiny": TrainingSize(
        partial(build_config, SIZES["tiny"]), query_len=4, image=(60, 45), records=8, loaded=2, matrix_side=64
    ),
}


def make_weights(config: FusionConfig, dtype: torch.dtype, device: torch.device) -> FusionForConditionalGeneration:
    """Return random weights, which are the same in every run, made on their device."""
    torch.manual_seed(SEED)
    with device:
        # transformers' constructor for a configuration: parameters in `dtype`, rotary tables in float32
        return FusionForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")


def build_model(size: Size, dtype: torch.dtype, device: torch.device) -> FusionForConditionalGeneration:
    """Build a model for inference."""
    model = make_weights(build_config(size), dtype, device)
    model.generation_config.eos_token_id = None  # random weights must not end the answer early
    return model.eval()


def sharing_copy(model: FusionForConditionalGeneration) -> FusionForConditionalGeneration:
    """Return a copy of the model with the same tensors, so that weights and gradients exist only once."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def build_eager(model: FusionForConditionalGeneration) -> FusionForConditionalGeneration:
    """Build a model with the same (shared) weights and eager attention in the tower and the language model."""
    eager = sharing_copy(model)
    eager.set_attn_implementation("eager")
    return eager


def make_photo(size: tuple[int, int]) -> Image.Image:
    """Return a decoded RGB photo `(width, height)`: an enlarged portrait of an astronaut (public domain)."""
    return Image.fromarray(skimage.data.astronaut()).resize(size, Image.Resampling.BICUBIC)


def make_image_processor(size: Size) -> FusionImageProcessor:
    return FusionImageProcessor(size={"height": size.image_side, "width": size.image_side})


def make_words(config: FusionConfig, random: np.random.Generator, count: int) -> list[int]:
    """Draw ordinary token ids."""
    last_ordinary = config.text_config.vocab_size - 2  # the two special tokens follow it
    return random.integers(FIRST_ORDINARY_ID, last_ordinary, count).tolist()


class Request(NamedTuple):
    """The content of a prompt: rows, tokens of each question, and user turns about the only image of a row."""

    batch: int = 1
    question_tokens: int = QUESTION_TOKENS
    turns: int = 1


ONE_QUESTION = Request()


class Text(NamedTuple):
    """One row: the ids of the prompt, the ids of its questions, and the last id of each turn's prompt."""

    ids: list[int]
    questions: list[int]
    ends: list[int]


def make_text(config: FusionConfig, request: Request, image: list[int], latents: list[int]) -> Text:
    """
    Return the same words for every model.

    Args:
        image: the ids that stand for the image.
        latents: the ids that stand for the latent tokens before each question.
    """
    words = partial(make_words, config, np.random.default_rng(SEED))
    ids, questions, ends = [*words(SYSTEM_TOKENS), *image], [], []
    for turn in range(request.turns):
        ids += words(ANSWER_TOKENS) if turn > 0 else []
        question = words(request.question_tokens)
        ids += [*latents, *question, *words(HEADER_TOKENS)]
        questions += question
        ends.append(len(ids) - 1)
    return Text(ids, questions, ends)


def make_prompt(config: FusionConfig, pixel_values: torch.Tensor, request: Request = ONE_QUESTION) -> Prompt:
    """
    Return the inputs of `generate`, with one image per row and no padding.

    Args:
        pixel_values (`(1, 5, 3, H, W)`): the image of every row, which also determines the device.
    """
    start, end = config.vision_start_token_id, config.vision_end_token_id
    image = [start, *[config.image_token_id] * config.num_image_tokens, end]
    text = make_text(config, request, image, [start, *[config.latent_token_id] * config.query_len, end])
    input_ids, questions, ends = (
        torch.tensor([row] * request.batch, device=pixel_values.device) for row in text
    )  # (B, S), (B, T), (B, R)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixel_values.repeat(request.batch, 1, 1, 1, 1),
        "instruct_input_ids": questions,
        "instruct_attention_mask": torch.ones_like(questions),
        "prompt_end_positions": ends,
    }


def make_batch(config: FusionConfig, size: TrainingSize, device: torch.device) -> dict[str, Any]:
    """Return a training batch of conversations about one image each, with several turns and no padding."""
    generator = np.random.default_rng(SEED)
    rows = [make_conversation(config, size, generator) for _ in range(size.batch)]
    side, channels = config.vision_config.image_size, config.vision_config.num_channels
    pixels = torch.from_numpy(generator.standard_normal((size.batch, NUM_TILES + 1, channels, side, side), np.float32))
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]} | {"pixel_values": pixels}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["instruct_attention_mask"] = torch.ones_like(batch["instruct_input_ids"])
    return {name: tensor.to(device) for name, tensor in batch.items()} | {"query_len": size.query_len}


def make_conversation(config: FusionConfig, size: TrainingSize, random: np.random.Generator) -> dict[str, list[int]]:
    """Return the ids, labels, question and prompt ends of one sample."""
    words = partial(make_words, config, random)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    ids = [*words(SYSTEM_TOKENS), start, *[config.image_token_id] * config.num_image_tokens, end]
    labels, questions, ends = [IGNORE_INDEX] * len(ids), [], []
    for _ in range(size.turns):
        question, answer = words(QUESTION_TOKENS), words(ANSWER_TOKENS)
        prompt = [start, *[config.latent_token_id] * size.query_len, end, *question, *words(HEADER_TOKENS)]
        ids += prompt + answer
        labels += [IGNORE_INDEX] * len(prompt) + answer
        questions += question
        ends.append(len(ids) - len(answer) - 1)
    return {"input_ids": ids, "labels": labels, "instruct_input_ids": questions, "prompt_end_positions": ends}
