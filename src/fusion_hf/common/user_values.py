"""Forms of values that several folders take from users; imports nothing heavy."""

from math import isqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = ("float32", "bfloat16", "float16")  # of weights
ADDRESSES = ("http://", "https://")


def torch_dtype(name: str) -> "torch.dtype":
    """Return the type called `name`, one of `DTYPE_NAMES`."""
    import torch

    return getattr(torch, name)


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the name of a type, as in a configuration."""
    return str(dtype).removeprefix("torch.")


def is_address(text: str) -> bool:
    """Return whether something is to be fetched, and no file's name."""
    return text[: len(ADDRESSES[-1])].lower().startswith(ADDRESSES)


def is_square(number: int) -> bool:
    """Return whether `number` is a perfect square from 1."""
    return number > 0 and isqrt(number) ** 2 == number
