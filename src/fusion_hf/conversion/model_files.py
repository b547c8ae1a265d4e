"""JSON files and weight files of model folders. This module imports nothing large."""

import json
from pathlib import Path, PurePath
from typing import Any

from fusion_hf.common.errors import InputError

# In order of preference. For each name, the index is looked for first.
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"


class ConversionError(InputError):
    """The input of a conversion does not fit. The message says what to do, and may list all tensors of a model."""

    longest = 10**6


def read_json(path: Path) -> dict[str, Any]:
    """
    Read the object in a JSON file.

    Args:
        path: Path of the file.

    Raises:
        ConversionError: If the file is missing or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} does not exist.") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must contain a JSON object, got a {type(content).__name__}.")
    return content


def first_line(error: BaseException) -> str:
    """Return the message of an error in one line, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.rstrip(". ")


def find_weight_files(folder: Path) -> list[Path]:
    """
    Find the weight files of a model folder.

    Args:
        folder: Model folder.

    Returns:
        The files in order, or an empty list.

    Raises:
        ConversionError: If an index names a file that does not exist or lies outside the folder.
    """
    for name in WEIGHT_NAMES:
        index = folder / (name + INDEX_SUFFIX)
        if index.is_file():
            shards = sorted(set(read_index(index).values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ConversionError(f"{index} names missing shards: {', '.join(missing)}. Download them again.")
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    return []


def read_index(path: Path) -> dict[str, str]:
    """
    Read an index file.

    Args:
        path: Path of the index.

    Returns:
        Names of shards by the names of their tensors.

    Raises:
        ConversionError: If the file is not an index, or if a shard is not a plain file name.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path} must have a `weight_map` from tensor names to shard names.")
    for shard in weight_map.values():
        # Windows paths are refused on other systems as well, and the reverse
        if not isinstance(shard, str) or PurePath(shard).name != shard or "\\" in shard or shard in ("", "..", "."):
            raise ConversionError(f"{path}: a shard must be the name of a file in the same folder, got {shard!r}.")
    return weight_map


def parse_query_lens(value: Any) -> list[int]:
    """
    Parse numbers of latent tokens.

    Args:
        value: The authors' text such as "4,16,36,64,144", a number or a list.

    Raises:
        ConversionError: If an item is not a whole number.
    """
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        return [int(item) for item in items]
    except (TypeError, ValueError) as error:
        raise ConversionError(f"`query_len` must be numbers such as '4,16,36,64,144', got {value!r}.") from error
