"""JSON files of model folders, which files hold their weights, and lists in them; imports nothing heavy."""

import json
from pathlib import Path, PurePath
from typing import Any

from fusion_hf.common.errors import InputError

# In order of preference; of each pair the index is looked for first.
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"


class ConversionError(InputError):
    """Says in one line what is wrong with the input and what to do. It may list tensors, and then lists all."""

    longest = 10**6


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ConversionError: if the file is missing, no JSON, or no object.
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
        raise ConversionError(f"{path} holds a {type(content).__name__}; allowed: a JSON object.")
    return content


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line and without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.rstrip(". ")


def find_weight_files(folder: Path) -> list[Path]:
    """Find the weight files of a model folder, in order; empty if it has none.

    Raises:
        ConversionError: if an index names a file that does not exist or lies outside the folder.
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
    """Key -> shard of an index file.

    Raises:
        ConversionError: if it is no index, or a shard is not a plain file name.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path} has no weight_map; allowed: an object of tensor names and shard names.")
    for shard in weight_map.values():
        # also refuses Windows paths on other systems and the other way round
        if not isinstance(shard, str) or PurePath(shard).name != shard or "\\" in shard or shard in ("", "..", "."):
            raise ConversionError(f"{path} names the shard {shard!r}; allowed: the name of a file in the same folder.")
    return weight_map


def parse_query_lens(value: Any) -> list[int]:
    """Latent lengths from the authors' text "4,16,36,64,144", a number or a list.

    Raises:
        ConversionError: if they are no whole numbers.
    """
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        return [int(item) for item in items]
    except (TypeError, ValueError) as error:
        raise ConversionError(f"query_len is {value!r}; allowed: numbers such as '4,16,36,64,144'.") from error
