"""Change the dtype of a model folder's weights without building the model, with one file in memory at a time."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from fusion_hf.common.outputs import atomic_path, write_atomically
from fusion_hf.inference.devices import DTYPES


def cast_weights(folder: Path, dtype: str) -> None:
    """
    Store the floating-point tensors of a model folder as `dtype` and update its configuration.

    Each file is replaced atomically, and casting again changes nothing. If the process is killed, run it again.

    Args:
        folder: the model folder.
        dtype: a key of `DTYPES`.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: _cast(opened.get_tensor(name), DTYPES[dtype]) for name in opened.keys()}  # noqa: SIM118
        with atomic_path(file) as draft:
            save_file(tensors, draft, metadata)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]["total_size"] = total
        _write(index, content)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = dtype
    _write(folder / CONFIG_NAME, config)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, sort_keys=path.name == SAFE_WEIGHTS_INDEX_NAME)
    write_atomically(path, f"{text}\n".encode())
