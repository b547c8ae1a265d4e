"""Types of arguments; imports nothing heavy."""

import argparse
import re

from fusion_hf.common.user_values import DTYPE_NAMES, is_square

AUTO = "auto"
DEVICE = re.compile(rf"{AUTO}|(?:cpu|cuda|mps)(?::[0-9]{{1,4}})?", re.ASCII)


def positive(text: str) -> int:
    """A whole number from 1.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number from 1")
    return int(text)


def square(text: str) -> int:
    """A perfect square.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    number = int(text) if text.isdecimal() else 0
    if not is_square(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a perfect square (1, 4, 9, 16, ...)")
    return number


def tolerance(text: str) -> float:
    """A number from 0 to below 1.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a number from 0 to below 1")
    return number


def device(text: str) -> str:
    """A device of torch by its name; whether this machine has it, torch knows.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: auto, cpu, cuda, cuda:1, mps")
    return text


def dtype(text: str) -> str:
    """A type of weights by its name.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if text not in (AUTO, *DTYPE_NAMES):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: {', '.join((AUTO, *DTYPE_NAMES))}")
    return text
