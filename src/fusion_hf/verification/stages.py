"""This package's results for a certificate, with the names of `authors_worker`, and the comparison of both sides."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fusion_hf.evaluation.stage_comparison import (
    DECODING,
    FEATURES,
    IDS,
    LOGITS,
    PIXELS,
    StageComparison,
    compare_stage,
)
from fusion_hf.inference.chat_model import ChatModel, question_message
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.verification.authors_worker import OVERVIEW, TILES, Recorder
from fusion_hf.verification.questions import VerificationQuestion

# Largest relative error that counts as equal. Pixels are normalized in different orders, even in float32.
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
PIXEL_TOLERANCE = 1e-6
ASKED, PROJECTOR_BACK, CONTEXT = "instruct_ids", "projector_back", "context"
EMBEDDINGS, TEXT, SAMPLERS = "embeddings", "text", "samplers"


@dataclass(frozen=True)
class AuthorsMarks:
    """Ids with which the authors' code marks the positions of the image and of latent tokens."""

    image: int
    latent: int


@dataclass
class QuestionComparison:
    """All stages of one question in the order of computation, and the tokens of both sides."""

    stages: list[StageComparison] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    authors_tokens: list[int] = field(default_factory=list)


def feature_names(config: FusionConfig) -> Iterator[str]:
    """Yield the names of the compared features in the order of computation."""
    yield PROJECTOR_BACK
    for image in (OVERVIEW, TILES):
        yield f"tower.{image}.{EMBEDDINGS}"
        for index in range(config.vision_config.num_hidden_layers):
            yield f"tower.{image}.layers.{index}"
        yield f"projector.{image}"
    yield CONTEXT
    yield f"{TEXT}.{EMBEDDINGS}"
    for index in range(config.text_config.num_hidden_layers):
        yield f"{TEXT}.layers.{index}"
        if index in config.sampler_layers:
            yield f"{SAMPLERS}.{index}"
    yield f"{TEXT}.norm"


def watch(model: FusionForConditionalGeneration) -> Recorder:
    """Record this package's modules. The features of a layer are those before its sampler."""
    recorder, core = Recorder(), model.model
    recorder.watch_output(core.vision_projector_back, PROJECTOR_BACK)
    recorder.watch_layers(core.vision_tower.layers, "tower.{image}")
    recorder.watch_output(core.vision_projector, "projector.{image}")
    layers = core.language_model.layers
    recorder.watch_input(layers[0], f"{TEXT}.{EMBEDDINGS}")
    for index, layer in enumerate(layers):
        if layer.vision_sampler is None:
            recorder.watch_output(layer, f"{TEXT}.layers.{index}")
            continue
        recorder.watch_input(layer.vision_sampler, f"{TEXT}.layers.{index}")
        recorder.watch_input(layer.vision_sampler, CONTEXT, lambda args: args[1].windows)
        recorder.watch_output(layer.vision_sampler, f"{SAMPLERS}.{index}", _rewritten)
    recorder.watch_output(core.language_model.norm, f"{TEXT}.norm")
    return recorder


def _rewritten(args: Any, output: torch.Tensor) -> torch.Tensor:
    """Return the latent tokens (1, q, D) of the only turn in a sampler's output (1, S, D)."""
    return output[:, args[1].latent_positions[0, 0]]


def record(chat_model: ChatModel, question: VerificationQuestion, num_tokens: int) -> dict[str, torch.Tensor]:
    """
    Record all stages of one question as this package computes them.

    Args:
        chat_model: The model.
        question: The question with its image.
        num_tokens: Number of tokens to generate.

    Returns:
        The tensors by the names of `authors_worker`.
    """
    model, processor = chat_model.model, chat_model.processor
    inputs = processor.apply_chat_template(
        [question_message(question.text, question.image)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    pixels = inputs["pixel_values"][0]
    recorder = watch(model)
    try:
        with torch.inference_mode():
            output = model.generate(
                **inputs.to(model.device, model.dtype),
                max_new_tokens=num_tokens,
                do_sample=False,
                # end tokens and suppressed tokens are settings, and the authors' checkpoint has other ones
                eos_token_id=None,
                suppress_tokens=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        recorder.close()
    return recorder.tensors | {
        "ids": inputs["input_ids"][0].cpu(),
        ASKED: inputs["instruct_input_ids"][0].cpu(),
        "pixels": pixels,
        "logits": torch.cat(output.logits).float().cpu(),
        "tokens": output.sequences[0, -num_tokens:].cpu(),
    }


def compare_question(
    ours: dict[str, torch.Tensor], theirs: Path, config: FusionConfig, marks: AuthorsMarks, tolerance: float
) -> QuestionComparison:
    """
    Compare the results of both sides for one question.

    Args:
        ours: Result of `record`.
        theirs: File of the worker, of which one tensor at a time is in memory.
        config: Configuration of the model.
        marks: Ids of the authors' marks.
        tolerance: Tolerance for features and logits.

    Returns:
        The comparison.
    """
    result = QuestionComparison()
    with safe_open(theirs, framework="pt") as stored:
        names = set(stored.keys())
        ids = expand_ids(stored.get_tensor("ids").tolist(), config, marks)
        result.stages.append(compare_stage(IDS, ids, ours["ids"].tolist()))
        asked = compare_stage(IDS, stored.get_tensor(ASKED).tolist(), ours[ASKED].tolist())
        result.stages.append(replace(asked, part=ASKED))
        result.stages.append(
            compare_stage(PIXELS, stored.get_tensor("pixels").float(), ours["pixels"].float(), PIXEL_TOLERANCE)
        )
        for name in feature_names(config):
            first = {name: _arranged(name, stored.get_tensor(name), config)} if name in names else {}
            second = {name: ours[name]} if name in ours else {}
            result.stages.append(replace(compare_stage(FEATURES, first, second, tolerance), part=name))
        result.authors_tokens, result.tokens = stored.get_tensor("tokens").tolist(), ours["tokens"].tolist()
        # behind the first different token, the two sides read different texts
        same = sum(1 for _ in _equal_beginning(result.authors_tokens, result.tokens)) + 1
        logits = stored.get_tensor("logits")[:same]
        result.stages.append(compare_stage(LOGITS, logits, ours["logits"][:same], tolerance))
        result.stages.append(compare_stage(DECODING, result.authors_tokens, result.tokens))
    return result


def _equal_beginning(first: list[int], second: list[int]) -> Iterator[int]:
    for a, b in zip(first, second, strict=False):
        if a != b:
            return
        yield a


def expand_ids(ids: list[int], config: FusionConfig, marks: AuthorsMarks) -> list[int]:
    """
    Expand the marks in the authors' ids to the placeholders of this package.

    Args:
        ids: Ids of the authors' prompt. Its first mark stands for the image, and other marks for latent blocks.
        config: Configuration of the model.
        marks: Ids of the authors' marks.

    Returns:
        The ids as this package writes them.
    """
    blocks = [[config.image_token_id] * config.num_image_tokens]
    result: list[int] = []
    for number in ids:
        if number in (marks.image, marks.latent):
            result += blocks.pop() if blocks else [config.latent_token_id] * config.query_len
        else:
            result.append(number)
    return result


def _arranged(name: str, tensor: torch.Tensor, config: FusionConfig) -> torch.Tensor:
    """Reshape a feature of the authors: the context (s w * s w, D) becomes windows (q, w * w, D)."""
    if name != CONTEXT:
        return tensor
    side, window = isqrt(config.query_len), config.window_size
    if tensor.shape[0] != (side * window) ** 2:
        return tensor
    return tensor.view(side, window, side, window, -1).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
