"""Weights on disk: headers of files, and single tensors.

Nothing in a file is executed. Safetensors contain no code, and `.bin` files are read with `weights_only=True`.
"""

import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fusion_hf.conversion.model_files import (
    INDEX_SUFFIX,
    WEIGHT_NAMES,
    ConversionError,
    find_weight_files,
    first_line,
    read_index,
)

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Location, shape and dtype of a tensor on disk, known without reading it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a string for types that are not plain floating-point numbers

    @property
    def num_bytes(self) -> int:
        """Size on disk in bytes."""
        size = self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 1
        return torch.Size(self.shape).numel() * size


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """
    Read the headers of weight files.

    Args:
        files: The files.

    Returns:
        The tensors by name.

    Raises:
        ConversionError: If a file is broken, or if two files contain the same name.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.key in stored:
                raise ConversionError(f"{tensor.key} is in both {stored[tensor.key].file.name} and {file.name}.")
            stored[tensor.key] = tensor
    return stored


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """
    Read the headers of a folder's weight files.

    Args:
        folder: Model folder.

    Returns:
        The tensors by name.

    Raises:
        ConversionError: See `read_headers` and `check_index`.
    """
    stored = read_headers(find_weight_files(folder))
    check_index(folder, stored)
    return stored


def check_index(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """
    Compare the index of a folder, if it has one, with the content of its files.

    Args:
        folder: Model folder.
        stored: Tensors in its files.

    Raises:
        ConversionError: If they disagree. The message lists all tensors that are not where the index says.
    """
    for name in WEIGHT_NAMES:
        index = folder / (name + INDEX_SUFFIX)
        if index.is_file():
            listed = read_index(index)
            wrong = [k for k, shard in listed.items() if k not in stored or stored[k].file.name != shard]
            wrong += [key for key in stored if key not in listed]
            if wrong:
                raise ConversionError(f"{index} and its shards disagree about: {', '.join(wrong)}.")
            return


def _read_header(file: Path) -> list[StoredTensor]:
    if file.suffix != ".safetensors":
        tensors = load_bin(file, "meta")
        return [StoredTensor(file, key, tuple(t.shape), _plain_dtype(t.dtype)) for key, t in tensors.items()]
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (a handle is not a dict)
            return [
                StoredTensor(file, key, tuple(s.get_shape()), SAFETENSORS_DTYPES.get(s.get_dtype(), s.get_dtype()))
                for key, s in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{file} is truncated or not a safetensors file: {first_line(error)}.") from error


def _plain_dtype(dtype: torch.dtype) -> torch.dtype | str:
    return dtype if dtype in SAFETENSORS_DTYPES.values() else str(dtype)


def load_bin(file: Path, device: str) -> dict[str, torch.Tensor]:
    """
    Load the tensors of a `.bin` file. They are mapped from disk, or read if the format is older than torch 1.6.

    Args:
        file: The file.
        device: Device for the tensors.

    Raises:
        ConversionError: If the file is broken or contains anything except tensors by name.
    """
    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{file} is not a weights file, or contains code, and was not loaded.") from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConversionError(f"{file} is truncated or not a weights file: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} must contain tensors by name, got a {type(content).__name__}.")
    others = [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor) or not isinstance(k, str)]
    if others:
        raise ConversionError(f"{file} contains entries that are not tensors: {', '.join(others)}.")
    return content


class TensorReader:
    """Reader that keeps at most one file open, so that at most one shard is in memory."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._content: Any = None

    def load(self, tensor: StoredTensor) -> torch.Tensor:
        """Load one tensor on the CPU. It may be a view of the mapped file."""
        if tensor.file != self._file:
            self.close()
            is_bin = tensor.file.suffix != ".safetensors"
            self._content = load_bin(tensor.file, "cpu") if is_bin else safe_open(tensor.file, framework="pt")
            self._file = tensor.file
        if isinstance(self._content, dict):
            return self._content[tensor.key]
        return self._content.get_tensor(tensor.key)

    def close(self) -> None:
        """Close the file. Its pages leave memory with the last tensor that was read from it."""
        self._file = self._content = None
