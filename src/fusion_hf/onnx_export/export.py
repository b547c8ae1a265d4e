"""Export of a model as two ONNX graphs: one for the image, and one for the language model with its samplers.

Shapes: S tokens of a pass, C tokens in the cache before it, T question tokens, R user turns, q latent tokens per turn,
w window size, n image tokens, D LLM width, G key heads, E their width. One prompt at a time.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import new_folder
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.model.configuration_fusion import NUM_TILES, TokenBudget
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_base import CACHE_NAME, cache_keyword
from fusion_hf.model.modeling_fusion_decoder import PlaceholderMasks
from fusion_hf.model.modeling_fusion_vision import pool_context, reduce_grid
from fusion_hf.onnx_export.exported_folder import (
    IMAGE_GRAPH,
    IMAGE_INPUTS,
    IMAGE_OUTPUTS,
    LANGUAGE,
    LANGUAGE_INPUTS,
    LOGITS,
    PAST,
    PRESENT,
    ExportSettings,
    cache_names,
    check_packages,
)

# Lengths in the traced example. Zero and one would become constants, and equal lengths would become the same
# dimension.
CACHED, QUESTION, TURNS = 3, 3, 2
LONG_ROPE = "longrope"
TEXT = 0  # id of all words in the example
DYNAMIC = torch.export.Dim.DYNAMIC


class _ImageGraph(nn.Module):
    """The graph that encodes an image and its question."""

    def __init__(self, model: FusionForConditionalGeneration, budget: TokenBudget):
        super().__init__()
        self.model = model.model
        self.budget = budget

    def forward(
        self, pixel_values: torch.Tensor, instruct_input_ids: torch.Tensor, instruct_attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Encode an image.

        Args:
            pixel_values (`(1, 5, 3, H, W)`): Tiles and overview.
            instruct_input_ids, instruct_attention_mask (`(1, T)`): The question.

        Returns:
            Image features `(1, n, D)`, latent tokens `(1, q, D)` and windows `(1, q, w * w, D)`.
        """
        config = self.model.config
        image = self.model.encode_image(pixel_values, instruct_input_ids, instruct_attention_mask)
        side, grid = config.num_patches_per_side, self.budget.image_token_grid
        pooled = pool_context(image.global_features, self.budget.query_len, config.window_size)
        return reduce_grid(image.image_features, side, grid), *pooled


class _LanguageGraph(nn.Module):
    """The graph for one pass of the language model, over a prompt or over the tokens after a cache."""

    def __init__(self, model: FusionForConditionalGeneration, budget: TokenBudget):
        super().__init__()
        self.model = model
        self.budget = budget

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_features: torch.Tensor,
        latents: torch.Tensor,
        windows: torch.Tensor,
        prompt_end_positions: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        """
        Run one pass of the language model.

        Args:
            input_ids (`(1, S)`), attention_mask (`(1, C + S)`): Inputs of the model.
            image_features, latents, windows: Outputs of the image's graph. They have no effect on ids without
                placeholders.
            prompt_end_positions (`(1, R)`): Input of the model. -1 stands for no turn.
            past (2 L times `(1, G, C, E)`): Keys and values of each layer.

        Returns:
            Logits `(1, 1, V)` of the last token, and keys and values `(1, G, C + S, E)` of each layer.
        """
        config = self.model.config
        marks = PlaceholderMasks.find(input_ids, config)
        words = torch.where(marks.image | marks.latent, TEXT, input_ids)  # placeholders have no embedding
        inputs_embeds = marks.fill(self.model.get_input_embeddings()(words), image_features, latents)
        cache = DynamicCache()  # with full layers, because masks implement sliding windows
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        outputs = self.model.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :],
            latent_updates=marks.latent_updates(windows, prompt_end_positions, self.budget.query_len),
            use_cache=True,
            **cache_keyword(cache),
        )
        return self.model.lm_head(outputs.last_hidden_state[:, -1:]), *keys_and_values(getattr(outputs, CACHE_NAME))


def keys_and_values(cache: Cache) -> tuple[torch.Tensor, ...]:
    """Return the keys and values of each layer in order."""
    return tuple(chain.from_iterable((layer.keys, layer.values) for layer in cache.layers))


def max_pool(feature_map: torch.Tensor, size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute `adaptive_max_pool2d` with operators that ONNX has.

    Args:
        feature_map: Maps `(B, D, H, W)`.
        size: Height and width of the result.

    Returns:
        The pooled maps, and zeros for the indices, which nothing uses.
    """
    for dim, cells in zip((2, 3), size, strict=True):
        length = feature_map.shape[dim]
        parts = []
        for cell in range(cells):
            begin, end = cell * length // cells, -(-(cell + 1) * length // cells)
            parts.append(feature_map.narrow(dim, begin, end - begin).amax(dim))
        feature_map = torch.stack(parts, dim)
    return feature_map, torch.zeros_like(feature_map, dtype=torch.long)


def export_onnx(
    chat_model: ChatModel, output: Path, query_len: int | None = None, image_token_grid: int | None = None
) -> None:
    """
    Export a model as two ONNX graphs in float32, with its processor and settings, for `onnx_export.runtime`.

    Args:
        chat_model: Model on the CPU in float32.
        output: A new or empty folder. It is created only when everything is complete.
        query_len, image_token_grid: Token counts, which are fixed in the graphs. Default to those of the model.

    Raises:
        InputError: If the device or dtype is wrong, a number is impossible, the folder is not empty, or the extra
            `onnx` is not installed.
    """
    check_packages()
    model = chat_model.model
    if model.device.type != "cpu" or model.dtype != torch.float32:
        got = f"{model.dtype} on {model.device}"
        raise InputError(f"The model must be in torch.float32 on the CPU, got {got}.")
    budget = chat_model.token_budget(query_len, image_token_grid)
    generation = model.generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    settings = ExportSettings(
        **budget._asdict(),
        # long RoPE changes all keys at its limit, and a graph cannot rebuild its cache
        max_length=chat_model.short_rope_length,
        eos_token_ids=ends,
        suppressed_ids=generation.suppress_tokens or [],
    )
    with new_folder(output) as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ignore advice about the exporter itself
        write_graphs(model, budget, folder)
        chat_model.processor.save_pretrained(folder)
        settings.write(folder)


def write_graphs(model: FusionForConditionalGeneration, budget: TokenBudget, folder: Path) -> None:
    """
    Trace both graphs with an example and write them, each with a file for its weights.

    Args:
        model: Model on the CPU in float32.
        budget: Token counts, which are fixed in the graphs.
        folder: Folder for the files.
    """
    text, layers = model.config.text_config, model.config.text_config.num_hidden_layers
    example, ends = _example_prompt(model, budget)
    size, channels = model.config.vision_config.image_size, model.config.vision_config.num_channels
    pixel_values = torch.zeros(1, NUM_TILES + 1, channels, size, size)
    question = torch.full((1, QUESTION), TEXT)
    seen = (pixel_values, question, torch.ones_like(question))
    graph = _ImageGraph(model, budget)
    shapes: Any = ({}, {1: DYNAMIC}, {1: DYNAMIC})
    _write(graph, seen, shapes, IMAGE_INPUTS, IMAGE_OUTPUTS, folder / IMAGE_GRAPH)

    # separate tensors, because the graph would use one input for all of them otherwise
    past = tuple(torch.zeros(1, text.num_key_value_heads, CACHED, head_width(model)) for _ in range(2 * layers))
    mask = torch.ones(1, CACHED + example.shape[1], dtype=torch.long)
    inputs = (example, mask, *graph(*seen), ends, past)
    shapes = ({1: DYNAMIC}, {1: DYNAMIC}, {}, {}, {}, {1: DYNAMIC}, ({2: DYNAMIC},) * len(past))
    names = (*LANGUAGE_INPUTS, *cache_names(PAST, layers))
    outputs = (LOGITS, *cache_names(PRESENT, layers))
    with _short_rope(model):
        _write(_LanguageGraph(model, budget), inputs, shapes, names, outputs, folder / LANGUAGE)


@contextmanager
def _short_rope(model: FusionForConditionalGeneration) -> Iterator[None]:
    """Use long RoPE's frequencies for up to `max_length` tokens. Older transformers choose them by a branch."""
    rotary = model.model.language_model.rotary_emb
    if model.config.text_config.rope_parameters.get("rope_type") != LONG_ROPE:
        yield
        return
    rotary.inv_freq.copy_(rotary.original_inv_freq)
    rotary.forward = partial(inspect.unwrap(type(rotary).forward), rotary)
    try:
        yield
    finally:
        del rotary.forward


def head_width(model: FusionForConditionalGeneration) -> int:
    """Return the width of an attention head, which not every configuration stores."""
    return model.model.language_model.layers[0].self_attn.head_dim


def _example_prompt(model: FusionForConditionalGeneration, budget: TokenBudget) -> tuple[torch.Tensor, torch.Tensor]:
    """Create ids `(1, S)` with an image and several turns, and the ends of these turns `(1, R)`."""
    config = model.config
    ids = [TEXT, *[config.image_token_id] * budget.num_image_tokens]
    ends = []
    for _ in range(TURNS):
        ids += [TEXT, *[config.latent_token_id] * budget.query_len, TEXT]
        ends.append(len(ids) - 1)
    return torch.tensor([ids]), torch.tensor([ends])


def _write(
    graph: nn.Module, inputs: tuple[Any, ...], shapes: Any, names: Sequence[str], outputs: Sequence[str], path: Path
) -> None:
    """Write one graph, with its weights in a separate file, because an ONNX file is limited to 2 GB."""
    program = torch.export.export(graph.eval(), inputs, dynamic_shapes=shapes, strict=False)
    program = program.run_decompositions({torch.ops.aten.adaptive_max_pool2d.default: max_pool})
    onnx = torch.onnx.export(program, input_names=names, output_names=outputs, dynamo=True, verbose=False)
    if onnx is None:
        raise RuntimeError("`torch.onnx.export` must return a program, got None.")
    onnx.save(path, external_data=True)
