"""Types of arguments; imports nothing heavy."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from fusion_hf.common.user_values import DTYPE_NAMES, is_square

AUTO = "auto"
DTYPES = (AUTO, *DTYPE_NAMES)
DEVICE = re.compile(rf"{AUTO}|(?:cpu|cuda|mps)(?::[0-9]{{1,4}})?", re.ASCII)
CONFIGS = "configs"
LARGEST_PORT = 2**16 - 1


def wrong_argument(text: str, allowed: str) -> ArgumentTypeError:
    """Make the error of an argument that is not allowed."""
    return ArgumentTypeError(f"{text!r} is not allowed; allowed: {allowed}")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Make a type of whole numbers from `least` to `most`."""
    allowed = f"a whole number from {least}" + ("" if most is None else f" to {most}")

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise wrong_argument(text, allowed)
        return int(text)

    return parse


positive = whole_number(1)


def square(text: str) -> int:
    """Read a perfect square; the error of anything else says so."""
    number = int(text) if text.isdecimal() else 0
    if not is_square(number):
        raise wrong_argument(text, "a perfect square (1, 4, 9, 16, ...)")
    return number


def config_file(text: str) -> str:
    """Find a file of yours, or one of `configs/` in the package: a wheel has no repository around it."""
    own = Path(text)
    if own.exists() or own.parts[:1] != (CONFIGS,) or ".." in own.parts:
        return text
    bundled = Path(str(resources.files("fusion_hf"))) / own
    return str(bundled) if bundled.is_file() else text


def tolerance(text: str) -> float:
    """Read a number from 0 to below 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise wrong_argument(text, "a number from 0 to below 1")
    return number


def device(text: str) -> str:
    """Read the name of a device of torch; whether this machine has it, torch knows."""
    if not DEVICE.fullmatch(text):
        raise wrong_argument(text, "auto, cpu, cuda, cuda:1, mps")
    return text
