"""Writes sharded safetensors while holding one tensor at a time.

The format needs every tensor's type and shape before the first byte of data, and conversion knows them: so the header
is written first and the data follows as it is read, where the usual `save_file` would need a whole shard in memory.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fusion_hf.common.outputs import check_space
from fusion_hf.conversion.inputs import MAX_SHARD_BYTES
from fusion_hf.conversion.stored_tensors import SAFETENSORS_DTYPES
from fusion_hf.hub.folders import WEIGHTS_INDEX

# of those that are written
DTYPE_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items() if dtype != torch.float64}
HEADER_ALIGNMENT = 8  # bytes
LENGTH_BYTES = 8  # of the header's length, little-endian


def write_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    load: Callable[[str], torch.Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or shards with an index.

    Args:
        folder: where to.
        shapes: every tensor, in the order in which they are written.
        dtype: the type of all of them: with one type, no tensor begins at an odd address.
        load: gives a tensor by its name, contiguous and of type `dtype`.
        max_shard_bytes: a shard is closed before it grows beyond this, unless one tensor is larger.

    Raises:
        InputError: if the disk has not as much space.
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
    """Yield names in order, in groups of at most `max_shard_bytes` bytes (or of a single larger tensor)."""
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
