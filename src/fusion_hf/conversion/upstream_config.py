"""Conversion of the authors' `config.json`, which mixes fields of the language model and FUSION, to a `FusionConfig`.

Only fields that the language model's own configuration class declares are kept, so that no generation setting, code
reference (`auto_map`) or path (`_name_or_path`) survives.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, SiglipVisionConfig

from fusion_hf.conversion.inputs import FUSION_FIELDS, TEXT_MODEL_TYPES, TOWER_FIELD, check_upstream, find_named_tower
from fusion_hf.conversion.model_files import ConversionError, first_line, parse_query_lens, read_json
from fusion_hf.model.configuration_fusion import FusionConfig

# Fields that transformers 4 uses for `rope_parameters`. The configuration classes translate them.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
# `use_cache` is False in checkpoints that training saved before its end
NOT_TAKEN_OVER = ("use_cache",)
# The authors' class for these always sets `rope_scaling` to None.
WITHOUT_ROPE_SCALING = ("fusion_qwen",)
DEFAULT_QUERY_LEN = 36

# Sizes that the authors' code chooses by the name of the tower, with all layers of the published towers.
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
GIANT_OPT = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40, "patch_size": 16}
SHARED_SIZES = {"num_attention_heads": 16, "image_size": 384}
GIANT_MARK = "siglip2"
# Without these fields, the defaults would silently describe another tower.
REQUIRED_SIZES = (*SO400M, *SHARED_SIZES)


def convert_config(upstream: dict[str, Any], tower: SiglipVisionConfig, image_token_grid: int | None) -> FusionConfig:
    """
    Convert the content of the authors' `config.json`.

    Args:
        upstream: The content.
        tower: Sizes of the whole tower. Its last layer is not kept.
        image_token_grid: Side of the reduced grid of FUSION-L, or None.

    Returns:
        The configuration.

    Raises:
        ConversionError: If a field is missing or has an impossible value.
    """
    check_upstream(upstream)
    counts = {name: upstream[name] for name in FUSION_FIELDS[1:]}
    if upstream["model_type"] in WITHOUT_ROPE_SCALING:
        upstream = upstream | {"rope_scaling": None}
    text = convert_text_config(upstream, TEXT_MODEL_TYPES[upstream["model_type"]])
    number, start = counts["num_of_vision_sampler_layers"], counts["start_of_vision_sampler_layers"]
    stride = counts["stride_of_vision_sampler_layers"]
    return fusion_config(
        text,
        tower,
        query_lens=parse_query_lens(upstream["query_len"]),
        window_size=counts["window_size"],
        sampler_layers=sampler_layers(number, start, stride, text.num_hidden_layers),
        image_token_grid=image_token_grid,
    )


def read_checkpoint_config(file: Path) -> FusionConfig:
    """
    Convert a checkpoint's `config.json` without reading its weights.

    Args:
        file: Path of the file.

    Returns:
        The configuration.

    Raises:
        ConversionError: See `convert_config`.
    """
    upstream = read_json(file)
    vision = find_named_tower(upstream)
    tower = read_tower_config(vision.path) if vision else named_tower(upstream.get(TOWER_FIELD))
    return convert_config(upstream, tower, None)


def convert_text_config(values: dict[str, Any], model_type: str) -> PreTrainedConfig:
    """
    Create the language model's configuration from a flat dict, without fields that its class does not declare.

    Args:
        values: The flat dict.
        model_type: Model type of the language model.

    Raises:
        ConversionError: If the class refuses a value.
    """
    config_class = CONFIG_MAPPING[model_type]
    values = values | {"rope_scaling": _complete_rope(values)}
    inherited = {field.name for field in fields(PreTrainedConfig)} | set(NOT_TAKEN_OVER)
    names = {field.name for field in fields(config_class)} - inherited | set(ROPE_FIELDS)
    try:
        return config_class(**{name: values[name] for name in names if values.get(name) is not None})
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"config.json is not a valid {model_type} configuration: {first_line(error)}."
        ) from error


def _complete_rope(values: dict[str, Any]) -> Any:
    """Add the factor of long RoPE that transformers 4 leaves implicit, and store its type under one name."""
    rope = values.get("rope_scaling")
    sizes = [values.get(name) for name in ("max_position_embeddings", "original_max_position_embeddings")]
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "longrope":
        return rope
    rope = {name: value for name, value in rope.items() if name != "type"} | {"rope_type": "longrope"}
    longest, original = sizes
    if "factor" not in rope and isinstance(longest, int) and isinstance(original, int) and original > 0:
        rope["factor"] = longest / original
    return rope


def fusion_config(
    text: PreTrainedConfig,
    tower: SiglipVisionConfig,
    query_lens: list[int],
    window_size: int,
    sampler_layers: list[int],
    image_token_grid: int | None = None,
) -> FusionConfig:
    """
    Create a `FusionConfig` from a language model and a whole tower.

    Args:
        text: Configuration of the language model.
        tower: Configuration of the whole tower. Its last layer is not kept.
        query_lens, window_size, sampler_layers, image_token_grid: See [`FusionConfig`].

    Raises:
        ConversionError: If a value is impossible.
    """
    kept = SiglipVisionConfig(**_sizes(tower.to_dict()) | {"num_hidden_layers": tower.num_hidden_layers - 1})
    try:
        return FusionConfig(
            text_config=text,
            vision_config=kept,
            query_len=DEFAULT_QUERY_LEN if DEFAULT_QUERY_LEN in query_lens else query_lens[0],
            query_lens=query_lens,
            window_size=window_size,
            sampler_layers=sampler_layers,
            image_token_grid=image_token_grid,
            architectures=["FusionForConditionalGeneration"],
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(first_line(error) + ".") from error


def sampler_layers(number: int, start: int, stride: int, num_layers: int) -> list[int]:
    """
    Compute the LLM layers of the samplers.

    Args:
        number: Number of samplers.
        start: Layer of the first sampler.
        stride: Distance of the layers of two samplers.
        num_layers: Number of layers of the language model.

    Raises:
        ConversionError: If there is no sampler, or more samplers than layers.
    """
    if not 0 < number <= num_layers or stride < 1:
        raise ConversionError(
            f"There must be 1 to {num_layers} samplers with a stride of at least 1, got {number} samplers with stride "
            f"{stride}."
        )
    return [start + stride * index for index in range(number)]


def named_tower(name: object) -> SiglipVisionConfig:
    """
    Return the tower that the authors' code loads for a name.

    Args:
        name: Value of `mm_vision_tower`.

    Raises:
        ConversionError: If the value is not a name.
    """
    if not isinstance(name, str):
        raise ConversionError(f"config.json: `mm_vision_tower` must be the name of a tower, got {name!r}.")
    return SiglipVisionConfig(**(GIANT_OPT if GIANT_MARK in name.lower() else SO400M), **SHARED_SIZES)


def read_tower_config(path: Path) -> SiglipVisionConfig:
    """
    Read the sizes of the whole tower.

    Args:
        path: A JSON file with the sizes, or a SigLIP folder with `config.json`.

    Raises:
        ConversionError: If a size is missing or impossible.
    """
    file = path / "config.json" if path.is_dir() else path
    values = read_json(file)
    values = values.get("vision_config", values)
    if not isinstance(values, dict):
        raise ConversionError(f"{file}: `vision_config` must be an object, got {values!r}.")
    model_type = values.get("model_type")
    if model_type not in (None, SiglipVisionConfig.model_type):
        allowed = repr(SiglipVisionConfig.model_type)
        raise ConversionError(f"{file}: `model_type` must be {allowed}, got {model_type!r}.")
    if model_type is not None:  # the file of a model omits the defaults of its class
        values = SiglipVisionConfig().to_dict() | values
    missing = [name for name in REQUIRED_SIZES if name not in values]
    if missing:
        raise ConversionError(f"{file} lacks {', '.join(missing)}.")
    wrong = [f"`{n}` = {values[n]!r}" for n in REQUIRED_SIZES if type(values[n]) is not int or values[n] < 1]
    if wrong:
        raise ConversionError(f"{file}: sizes must be whole numbers of at least 1, got {', '.join(wrong)}.")
    try:
        return SiglipVisionConfig(**_sizes(values))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"{file}: {first_line(error)}.") from error


def _sizes(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a tower's configuration that describe its layers."""
    inherited = {field.name for field in fields(PreTrainedConfig)} | {"vision_use_head"}
    names = {field.name for field in fields(SiglipVisionConfig)} - inherited
    return {name: value for name, value in values.items() if name in names}
