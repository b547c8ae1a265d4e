"""What is compared: FUSION, other ways of computing it, peers in transformers, and compiled decoding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peers import (
    build_llava_onevision,
    build_smolvlm,
    llava_onevision_prompt,
    llava_onevision_tokens,
    smolvlm_prompt,
    smolvlm_tokens,
)
from reference import build_reference
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, PreTrainedModel
from workload import ONE_QUESTION, Prompt, Request, Size, build_eager, make_prompt

from fusion_hf import CompiledGenerator, FusionConfig, FusionForConditionalGeneration
from fusion_hf.model.configuration_fusion import NUM_TILES

OURS, EAGER, REFERENCE = "ours", "eager", "reference"
LLAVA, LLAVA_TILED, SMOLVLM = "llava_onevision", "llava_onevision_tiled", "smolvlm"
VARIANTS, PEERS = (EAGER, REFERENCE), (LLAVA, LLAVA_TILED, SMOLVLM)
# `CompiledGenerator` with compiled steps, and with compiled prompts as well
AHEAD, PROMPT_COMPILED = "ours_ahead", "ours_prompt_compiled"
GENERATORS = (AHEAD, PROMPT_COMPILED)
COMPILED = {"ours_compiled": OURS, AHEAD: OURS, PROMPT_COMPILED: OURS, "llava_onevision_compiled": LLAVA}
NAMES = (OURS, *VARIANTS, *PEERS, *COMPILED)
PRODUCTS_OF_ATTENTION = 2  # scores, and weighted sums of values
FLOPS_OF_PRODUCT = 2  # multiply and add
KEYS_AND_VALUES = 2


@dataclass(frozen=True)
class Contestant:
    """
    A model with its inputs.

    Args:
        prompt: the inputs of `generate`.
        encoder: the module that encodes images.
        method: the name of its method that encodes images.
        tiles: the number of tiles of an image.
        picture_tokens: the number of tokens of an image in the language model.
        options: the options of `generate`.
        generator: what generates instead of the model.
    """

    model: PreTrainedModel
    prompt: Callable[[Request], Prompt]
    encoder: nn.Module
    method: str
    tiles: int
    picture_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    generator: CompiledGenerator | None = None

    def generate(self, prompt: Prompt, new_tokens: int, **given: Any) -> Any:
        """Generate greedily."""
        return self.model.generate(**prompt, **given, max_new_tokens=new_tokens, do_sample=False, **self.options)

    def prefill(self, prompt: Prompt) -> Any:
        return self.model(**prompt, use_cache=True, logits_to_keep=1)


def default_names(size: Size) -> list[str]:
    """
    Return the contestants that are informative at a size: other ways of computing FUSION at the middle size, and
    decoding loops on a GPU.
    """
    left_out = (AHEAD,) if size.released is None else VARIANTS
    return [name for name in NAMES if name not in left_out]


def compiled_options(device: torch.device) -> dict[str, Any]:
    """Return options of `generate` for decoding with a compiled model over a static cache, on any device."""
    if device.type == "cpu":  # the C++ wrapper saves time there, as CUDA graphs do on a GPU
        config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options={"cpp_wrapper": True})
    else:
        config = CompileConfig(fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # otherwise only accelerators compile
    return {"cache_implementation": "static", "compile_config": config}


def make_generator(
    ours: FusionForConditionalGeneration, length: int, new_tokens: int, compile_prompt: bool
) -> CompiledGenerator:
    """Make a compiled generator for prompts of this length, with CUDA graphs on CUDA."""
    mode = "default" if ours.device.type == "cpu" else "reduce-overhead"
    return CompiledGenerator(ours, [length], new_tokens, compile_prompt=compile_prompt, mode=mode)


def build_contestants(
    names: Sequence[str], ours: FusionForConditionalGeneration, pixel_values: torch.Tensor, new_tokens: int
) -> dict[str, Contestant]:
    """
    Build the requested contestants in the order of `NAMES`.

    Args:
        pixel_values (`(1, 5, 3, H, W)`): the image of every prompt.
        new_tokens: the maximum number of generated tokens where the prompt is compiled.
    """
    config, prompt = ours.config, partial(make_prompt, ours.config, pixel_values)
    built: dict[str, Contestant] = {}
    for name, build in ((OURS, lambda model: model), (EAGER, build_eager), (REFERENCE, build_reference)):
        if name in names:
            model = build(ours)
            tokens = config.num_image_tokens
            built[name] = Contestant(model, prompt, model.model, "encode_image", NUM_TILES + 1, tokens)
    built |= build_peers(names, ours, pixel_values)
    for name, original in COMPILED.items():
        if name in GENERATORS and name in names:
            length = prompt(ONE_QUESTION)["input_ids"].shape[1]
            generator = make_generator(ours, length, new_tokens, name == PROMPT_COMPILED)
            built[name] = replace(built[original], generator=generator)
        elif name in names:
            built[name] = replace(built[original], options=compiled_options(ours.device))
    return {name: built[name] for name in NAMES if name in built}


def build_peers(
    names: Sequence[str], ours: FusionForConditionalGeneration, pixel_values: torch.Tensor
) -> dict[str, Contestant]:
    """Build the peers. LLaVA-OneVision's two layouts share one model."""
    config: FusionConfig = ours.config
    built = {}
    if LLAVA in names or LLAVA_TILED in names:
        model = build_llava_onevision(ours)
        for name, tiled in ((LLAVA, False), (LLAVA_TILED, True)):
            tokens = llava_onevision_tokens(config, tiled)
            prompt = partial(llava_onevision_prompt, config, pixel_values, tiled)
            tiles = NUM_TILES + 1 if tiled else 1
            built[name] = Contestant(model, prompt, model.model, "get_image_features", tiles, tokens)
    if SMOLVLM in names:
        model = build_smolvlm(ours)
        prompt = partial(smolvlm_prompt, config, pixel_values)
        tokens = smolvlm_tokens(config)
        built[SMOLVLM] = Contestant(model, prompt, model.model, "get_image_features", NUM_TILES + 1, tokens)
    return {name: contestant for name, contestant in built.items() if name in names}


def missing_originals(names: Sequence[str]) -> list[str]:
    """Return what must be measured as well: FUSION, and the plain version of each compiled model."""
    needed = [OURS, *(COMPILED[name] for name in names if name in COMPILED)]
    return [name for name in dict.fromkeys(needed) if name not in names]


def prefill_flops(contestant: Contestant, prompt: Prompt) -> int:
    """
    Count the operations of the matrix products, convolutions and attention of a prompt.

    They are counted during a run, except for the language model's attention, where each token attends to itself and
    earlier ones, half of the square.
    """
    # the counter counts attention only if it consists of matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        contestant.prefill(prompt)
    text = contestant.model.config.text_config
    batch, length = prompt["input_ids"].shape
    masked_pairs = batch * length * (length - 1) // 2
    width = text.num_attention_heads * head_width(text)
    masked = masked_pairs * width * FLOPS_OF_PRODUCT * PRODUCTS_OF_ATTENTION * text.num_hidden_layers
    return counter.get_total_flops() - masked


def weight_bytes(ours: FusionForConditionalGeneration) -> int:
    """
    Return the bytes of the weights that every token is multiplied with: the language model without samplers, and
    the head.
    """
    layers = ours.model.language_model.layers
    read = [*layers.parameters(), *ours.lm_head.parameters()]
    idle = [weight for index in ours.config.sampler_layers for weight in layers[index].vision_sampler.parameters()]
    return sum(weight.nbytes for weight in read) - sum(weight.nbytes for weight in idle)


def cache_bytes(contestant: Contestant, length: float) -> int:
    """Return the bytes of the keys and values of so many tokens."""
    text = contestant.model.config.text_config
    values = KEYS_AND_VALUES * text.num_hidden_layers * text.num_key_value_heads * head_width(text)
    return round(values * length * contestant.model.dtype.itemsize)


def head_width(text: Any) -> int:
    """Return the head size of a language model's configuration, which may lack it or set it to None."""
    return text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
