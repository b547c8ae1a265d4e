"""Writer of sharded safetensors that holds one tensor in memory at a time.

The format stores the dtype and shape of every tensor before the data. Conversion knows them, so it writes the header
first and then streams the data. The usual `save_file` would need a whole shard in memory.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fusion_hf.common.outputs import check_space
from fusion_hf.conversion.inputs import MAX_SHARD_BYTES
from fusion_hf.conversion.stored_tensors import SAFETENSORS_DTYPES
from fusion_hf.hub.folders import WEIGHTS_INDEX

# codes of the dtypes that are written
DTYPE_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items() if dtype != torch.float64}
HEADER_ALIGNMENT = 8  # bytes
LENGTH_BYTES = 8  # size of the field with the header's length, little-endian


def write_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    load: Callable[[str], torch.Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """
    Write `model.safetensors`, or shards with an index.

    Args:
        folder: Folder to write to.
        shapes: Shapes of all tensors, in the order in which they are written.
        dtype: Dtype of all tensors. With a single dtype, no tensor begins at an unaligned address.
        load: Function that returns a tensor by its name, contiguous and in `dtype`.
        max_shard_bytes: Maximum size of a shard in bytes, unless a single tensor is larger.

    Raises:
        InputError: If the disk does not have enough space.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    check_space(folder, sum(sizes.values()))
    shards = list(split_into_shards(sizes, max_shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names}, sizes, dtype, load)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
        metadata = {"total_parameters": parameters, "total_size": sum(sizes.values())}
        index = {"metadata": metadata, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def split_into_shards(sizes: dict[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    """
    Split tensors into shards.

    Args:
        sizes: Sizes of the tensors in bytes, by name.
        max_shard_bytes: Maximum size of a shard in bytes, unless a single tensor is larger.

    Yields:
        Names of the tensors in each shard, in order.
    """
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > max_shard_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _write_shard(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    sizes: dict[str, int],
    dtype: torch.dtype,
    load: Callable[[str], torch.Tensor],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        file.write(text)
        for name in shapes:
            file.write(load(name).view(torch.uint8).numpy().data)
