"""Assembly of an untrained FUSION from a language model and a SigLIP tower, for training."""

import re

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fusion_hf.common.outputs import new_folder
from fusion_hf.conversion import repositories
from fusion_hf.conversion.inputs import BuildInputs, BuildOptions, InputLocation, describe, find_build_inputs
from fusion_hf.conversion.key_tables import LANGUAGE_MODEL_ROWS, TOWER_TABLE, Row
from fusion_hf.conversion.marked_tokenizer import add_marks, choose_tokenizer, vocabulary_size
from fusion_hf.conversion.model_card import Provenance, write_card
from fusion_hf.conversion.model_files import ConversionError
from fusion_hf.conversion.model_folder import (
    make_generation_config,
    make_processor,
    read_generation_config,
    set_dtype,
    write_files,
)
from fusion_hf.conversion.shard_writer import DTYPE_CODES, write_weights
from fusion_hf.conversion.stored_tensors import read_folder
from fusion_hf.conversion.upstream_config import convert_text_config, fusion_config, read_tower_config, sampler_layers
from fusion_hf.conversion.weight_plan import HEAD, NUM_MARKS, TensorSource, WeightPlan, WeightReader, make_plan
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration

FRESH = re.compile(r"^model\.vision_projector(?:_back)?\.|\.vision_sampler\.")
UPSTREAM_EMBEDDING = "model.embed_tokens.weight"


def build(options: BuildOptions, inputs: BuildInputs | None = None) -> str:
    """
    Build the folder of an untrained model. The whole model is in memory, in the target dtype.

    Args:
        options: What to build.
        inputs: Result of `find_build_inputs`, if you have called it already.

    Returns:
        A line that describes the result.

    Raises:
        InputError: If the backbones do not fit. Nothing is left behind then.
    """
    inputs = find_build_inputs(options) if inputs is None else inputs
    text, vision, values = inputs.text, inputs.vision, inputs.values
    model_type = values["model_type"]
    text_source = _read(text, LANGUAGE_MODEL_ROWS, grows=True)
    text_config = convert_text_config(values, model_type)
    tokenizer = choose_tokenizer(inputs.tokenizer, model_type, text_config.max_position_embeddings)
    text_config.vocab_size = _vocab_size(text_source, tokenizer)
    config = fusion_config(
        text_config,
        read_tower_config(vision.path),
        query_lens=list(options.query_lens),
        window_size=options.window_size,
        sampler_layers=sampler_layers(
            options.num_samplers, options.start, options.stride, text_config.num_hidden_layers
        ),
    )
    if tokenizer is not None:
        add_marks(tokenizer, text_config.vocab_size)
        text_config.pad_token_id = tokenizer.pad_token_id
    plan = make_plan(config, [_read(vision, TOWER_TABLE), text_source], {}, vision.name, fresh=FRESH)
    dtype = plan.choose_dtype(options.dtype)
    set_dtype(config, dtype)
    if options.dry_run or options.output is None:
        return f"The backbones fit: {len(plan.recipes)} tensors in {DTYPE_CODES[dtype]}. Nothing was written."

    with new_folder(options.output) as folder:
        weights = make_weights(config, plan, dtype, options.seed)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        write_weights(folder, shapes, dtype, lambda name: weights[name].contiguous())
        generation = make_generation_config(config, tokenizer, read_generation_config(text.path))
        num_parameters = sum(weight.numel() for weight in weights.values())
        name = options.repo_id or options.output.name
        provenance = _provenance(options, name, text, vision, dtype, num_parameters, tokenizer is not None)
        write_files(folder, config, make_processor(config, tokenizer), generation, write_card(config, provenance))
    pushed = repositories.push(options.output, options.repo_id, options.private, "Build an untrained FUSION")
    size = f"{num_parameters:,} parameters in {DTYPE_CODES[dtype]}"
    return f"Wrote {options.output}: an untrained FUSION of {size}.{pushed}"


def _read(location: InputLocation, table: tuple[Row, ...], grows: bool = False) -> TensorSource:
    return TensorSource(read_folder(location.path), table, grows=grows)


def _vocab_size(text: TensorSource, tokenizer: PreTrainedTokenizerFast | None) -> int:
    """Return the number of rows of the new embedding: those in use (the authors drop spare rows), plus two."""
    embedding = text.tensors.get(UPSTREAM_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ConversionError(f"--text: the weights must have a matrix {UPSTREAM_EMBEDDING}, but it is missing.")
    rows = embedding.shape[0]
    used = rows if tokenizer is None else vocabulary_size(tokenizer)
    if used > rows:
        raise ConversionError(f"--text: the embedding must have a row for each of {used} tokens, got {rows} rows.")
    return used + NUM_MARKS


def make_weights(config: FusionConfig, plan: WeightPlan, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """
    Create all weights of the model: those of the backbones, and randomly initialized ones for FUSION's own parts.

    Args:
        config: Configuration of the model.
        plan: Weights of the backbones.
        dtype: Dtype of all weights.
        seed: Seed for the random weights.

    Returns:
        The weights by name.
    """
    torch.manual_seed(seed)
    model = FusionForConditionalGeneration._from_config(config, dtype=dtype)
    weights = model.state_dict()
    reader = WeightReader()
    for name, recipe in tqdm(plan.recipes.items(), unit="tensors", disable=None):
        weights[name].copy_(reader.load(recipe, dtype))
    reader.close()
    if config.tie_word_embeddings:
        del weights[HEAD]
    return weights


def _provenance(
    options: BuildOptions,
    name: str,
    text: InputLocation,
    vision: InputLocation,
    dtype: torch.dtype,
    num_parameters: int,
    has_tokenizer: bool,
) -> Provenance:
    return Provenance(
        title=name.split("/")[-1],
        model_id=name,
        sources=(("language model", describe(text)), ("vision tower", describe(vision))),
        base_models=tuple(location.name for location in (text, vision) if "/" in location.name),
        dtype=dtype,
        num_parameters=num_parameters,
        has_tokenizer=has_tokenizer,
        is_untrained=True,
        notes=(
            f"Projectors and samplers are initialised with seed {options.seed}; the rows of the two new tokens are "
            "the mean of the others.",
        ),
    )
