"""Checks and names of values that users pass in several places. This module imports nothing large."""

from math import isqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = ("float32", "bfloat16", "float16")  # of weights
ADDRESSES = ("http://", "https://")


def torch_dtype(name: str) -> "torch.dtype":
    """Return the dtype called `name`, one of `DTYPE_NAMES`."""
    import torch

    return getattr(torch, name)


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the name of a dtype, as written in configurations."""
    return str(dtype).removeprefix("torch.")


def is_address(text: str) -> bool:
    """Return whether a text is an http(s) URL, and not a file name."""
    return text[: len(ADDRESSES[-1])].lower().startswith(ADDRESSES)


def is_square(number: int) -> bool:
    """Return whether `number` is a perfect square of at least 1."""
    return number > 0 and isqrt(number) ** 2 == number
