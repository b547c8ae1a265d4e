"""Conversion of the authors' checkpoints to Hub folders: read headers, check everything, then stream the weights."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fusion_hf.common.outputs import new_folder
from fusion_hf.common.user_values import dtype_name
from fusion_hf.conversion import lora_updates, repositories
from fusion_hf.conversion.inputs import (
    ADAPTER_CONFIG,
    PROJECTOR,
    TEXT_MODEL_TYPES,
    ConversionInputs,
    ConversionOptions,
    InputLocation,
    describe,
    find_conversion_inputs,
)
from fusion_hf.conversion.key_tables import CHECKPOINT_TABLE, TOWER_TABLE
from fusion_hf.conversion.marked_tokenizer import add_marks, choose_tokenizer
from fusion_hf.conversion.model_card import Provenance, write_card
from fusion_hf.conversion.model_files import find_weight_files, read_json
from fusion_hf.conversion.model_folder import (
    make_generation_config,
    make_processor,
    read_generation_config,
    set_dtype,
    write_files,
)
from fusion_hf.conversion.shard_writer import write_weights
from fusion_hf.conversion.stored_tensors import StoredTensor, read_folder, read_headers
from fusion_hf.conversion.upstream_config import convert_config, named_tower, read_tower_config
from fusion_hf.conversion.weight_plan import TensorSource, WeightPlan, WeightReader, make_plan
from fusion_hf.hub.family import LAST_STAGE, TOWER_SIZES, find_member, is_of_authors
from fusion_hf.model.configuration_fusion import FusionConfig

UPSTREAM_TOWER = "model.vision_tower."
STAGE = re.compile(r"Stage1(?:\.5)?", re.IGNORECASE)
TOWER_HINT = (
    "The checkpoint does not contain a frozen tower. Pass a SigLIP folder with its weights as --vision-config."
)


@dataclass(frozen=True)
class WeightSources:
    """All stored tensors of a conversion, and where they come from."""

    sources: list[TensorSource]
    locations: dict[str, InputLocation]
    updates: dict[str, lora_updates.LoraPair]


@dataclass(frozen=True)
class Conversion:
    """A checked conversion. Everything is known except the weights themselves."""

    config: FusionConfig
    plan: WeightPlan
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerFast | None
    locations: dict[str, InputLocation]

    @property
    def summary(self) -> str:
        """One line about the tensors and parameters."""
        return (
            f"{len(self.plan.recipes)} tensors, {self.plan.num_parameters:,} parameters in "
            f"{dtype_name(self.dtype)}, {self.plan.num_dropped} dropped, none unknown or missing"
        )


def convert(options: ConversionOptions, inputs: ConversionInputs | None = None) -> str:
    """
    Convert a checkpoint, or only check it with `dry_run`.

    Args:
        options: What to convert.
        inputs: Result of `find_conversion_inputs`, if you have called it already.

    Returns:
        A line that describes the result.

    Raises:
        InputError: If anything does not fit. Nothing is left behind then.
    """
    conversion = prepare(options, find_conversion_inputs(options) if inputs is None else inputs)
    if options.dry_run or options.output is None:
        return f"The checkpoint fits: {conversion.summary}. Nothing was written."
    with new_folder(options.output) as folder:
        write(folder, conversion, options)
    message = f"Convert {conversion.locations['checkpoint'].name} to transformers"
    pushed = repositories.push(options.output, options.repo_id, options.private, message)
    return f"Wrote {options.output}: {conversion.summary}.{pushed}"


def prepare(options: ConversionOptions, inputs: ConversionInputs) -> Conversion:
    """
    Read configurations, headers and the tokenizer, and check that they fit together.

    Args:
        options: What to convert.
        inputs: Result of `find_conversion_inputs`.

    Returns:
        The checked conversion.

    Raises:
        ConversionError: If anything does not fit.
    """
    checkpoint, upstream, vision = inputs.checkpoint, inputs.upstream, inputs.vision
    tower = read_tower_config(vision.path) if vision else named_tower(upstream.get("mm_vision_tower"))
    config = convert_config(upstream, tower, options.image_token_grid)

    weights = read_weights(checkpoint, inputs.base, vision, TEXT_MODEL_TYPES[upstream["model_type"]])
    tower_name = vision.name if vision else f"mm_vision_tower {upstream['mm_vision_tower']!r}"
    plan = make_plan(config, weights.sources, weights.updates, tower_name, TOWER_HINT)
    longest = upstream.get("tokenizer_model_max_length")
    if not isinstance(longest, int):
        longest = config.text_config.max_position_embeddings
    tokenizer = choose_tokenizer(inputs.tokenizer, config.text_config.model_type, longest)
    if tokenizer is not None:
        add_marks(tokenizer, config.text_config.vocab_size)
        config.text_config.pad_token_id = tokenizer.pad_token_id
    dtype = plan.choose_dtype(options.dtype)
    set_dtype(config, dtype)
    return Conversion(config, plan, dtype, tokenizer, weights.locations)


def read_weights(
    checkpoint: InputLocation, base: InputLocation | None, vision: InputLocation | None, text_type: str
) -> WeightSources:
    """
    Read the headers of all parts of a full, LoRA or adapter-only checkpoint, after `check_layout`.

    Args:
        checkpoint: The checkpoint.
        base: Model that a LoRA or adapter-only run was trained on.
        vision: Folder of the tower, or file with its sizes.
        text_type: Model type of the language model.

    Returns:
        All tensors and where they come from.
    """
    folder = checkpoint.path
    locations = {"checkpoint": checkpoint}
    sources, updates = [], {}
    if base is None:
        sources.append(TensorSource(_read_full(checkpoint), CHECKPOINT_TABLE))
    else:
        locations["base"] = base
        base_type = read_json(base.path / "config.json").get("model_type")
        sources.append(TensorSource(_read_full(base), CHECKPOINT_TABLE, grows=base_type == text_type))
        if (folder / ADAPTER_CONFIG).is_file():
            updates = lora_updates.read_lora(folder)
        for name in (lora_updates.NON_LORA, PROJECTOR):
            if (folder / name).is_file():
                sources.append(TensorSource(lora_updates.read_trained_whole(folder / name), CHECKPOINT_TABLE))
    has_tower = any(key.startswith(UPSTREAM_TOWER) for source in sources for key in source.tensors)
    if vision is not None:
        locations["tower"] = vision
        tower_files = find_weight_files(vision.path) if vision.path.is_dir() else []
        if tower_files and not has_tower:
            sources.insert(0, TensorSource(read_headers(tower_files), TOWER_TABLE))
    return WeightSources(sources, locations, updates)


def _read_full(location: InputLocation) -> dict[str, StoredTensor]:
    """Read the headers of a folder with complete weights, or of a repository whose weights were not downloaded."""
    return repositories.read_remote_headers(location) if location.is_remote else read_folder(location.path)


def write(folder: Path, conversion: Conversion, options: ConversionOptions) -> None:
    """
    Write all files of the result into an empty folder.

    Args:
        folder: The empty folder.
        conversion: The checked conversion.
        options: What to convert.
    """
    config, plan = conversion.config, conversion.plan
    shapes = {name: recipe.shape for name, recipe in plan.recipes.items()}
    reader = WeightReader()
    name = f"convert {conversion.locations['checkpoint'].name}"
    with tqdm(total=plan.num_parameters, desc=name, unit="parameters", unit_scale=True, disable=None) as progress:

        def load(name: str) -> torch.Tensor:
            weight = reader.load(plan.recipes[name], conversion.dtype)
            progress.update(weight.numel())
            return weight

        write_weights(folder, shapes, conversion.dtype, load, options.max_shard_bytes)
    reader.close()

    checkpoint = conversion.locations["checkpoint"]
    generation = make_generation_config(config, conversion.tokenizer, read_generation_config(checkpoint.path))
    provenance = _provenance(conversion, options)
    write_files(
        folder, config, make_processor(config, conversion.tokenizer), generation, write_card(config, provenance)
    )


def _provenance(conversion: Conversion, options: ConversionOptions) -> Provenance:
    output = options.output.name if options.output is not None else conversion.locations["checkpoint"].name
    stage = STAGE.search(conversion.locations["checkpoint"].name)
    bases = [location.name for role in ("base", "tower") if (location := conversion.locations.get(role)) is not None]
    if "tower" not in conversion.locations:
        named = read_json(conversion.locations["checkpoint"].path / "config.json").get("mm_vision_tower")
        bases += [tower for tower in TOWER_SIZES.values() if tower == named]
    notes = [f"{conversion.plan.num_dropped} tensors that FUSION does not use were dropped."]
    num_updates = sum(recipe.lora is not None for recipe in conversion.plan.recipes.values())
    if num_updates:
        notes.append(f"LoRA updates were added to {num_updates} weights.")
    if conversion.config.image_token_grid is not None:
        notes.append(f"FUSION-L: image features are reduced to a grid of side {conversion.config.image_token_grid}.")
    return Provenance(
        title=(options.repo_id or output).split("/")[-1],
        model_id=options.repo_id or output,
        sources=tuple((role, describe(location)) for role, location in conversion.locations.items()),
        base_models=tuple(name for name in bases if "/" in name),
        dtype=conversion.dtype,
        num_parameters=conversion.plan.num_parameters,
        has_tokenizer=conversion.tokenizer is not None,
        is_authors="base" not in conversion.locations
        and is_of_authors(conversion.locations["checkpoint"].name, find_member(conversion.config)),
        stage=stage[0] if stage else LAST_STAGE,
        notes=tuple(notes),
    )
