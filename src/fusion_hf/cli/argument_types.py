"""Types of arguments; imports nothing heavy."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from fusion_hf.common.user_values import DTYPE_NAMES, is_square
from fusion_hf.inference.sampling_options import LARGEST_TEMPERATURE

AUTO = "auto"
DTYPES = (AUTO, *DTYPE_NAMES)
DEVICE = re.compile(rf"{AUTO}|(?:cpu|cuda|mps)(?::[0-9]{{1,4}})?", re.ASCII)
CONFIGS = "configs"
LARGEST_PORT = 2**16 - 1


def wrong_argument(text: str, allowed: str) -> ArgumentTypeError:
    """Make the error of an argument that is not allowed."""
    return ArgumentTypeError(f"must be {allowed}, got {text!r}")


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
    """Read a perfect square."""
    number = int(text) if text.isdecimal() else 0
    if not is_square(number):
        raise wrong_argument(text, "a perfect square (1, 4, 9, 16, ...)")
    return number


def number(is_allowed: Callable[[float], bool], allowed: str) -> Callable[[str], float]:
    """Make a type of numbers, of which `allowed` describes those that `is_allowed` takes."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")  # which no comparison takes
        if not is_allowed(value):
            raise wrong_argument(text, allowed)
        return value

    return parse


tolerance = number(lambda value: 0 <= value < 1, "a number from 0 to below 1")
amount = number(lambda value: 0 < value < float("inf"), "a number above 0")
share = number(lambda value: 0 < value <= 1, "a number above 0 and at most 1")
temperature = number(lambda value: 0 <= value <= LARGEST_TEMPERATURE, f"a number from 0 to {LARGEST_TEMPERATURE:g}")


def device(text: str) -> str:
    """Read the name of a device; torch checks later whether this machine has it."""
    if not DEVICE.fullmatch(text):
        raise wrong_argument(text, "auto, cpu, cuda, cuda:1 or mps")
    return text


def config_file(text: str) -> str:
    """Find a file of yours, or one of `configs/` in the package: a wheel has no repository around it."""
    own = Path(text)
    if own.exists() or own.parts[:1] != (CONFIGS,) or ".." in own.parts:
        return text
    bundled = Path(str(resources.files("fusion_hf"))) / own
    return str(bundled) if bundled.is_file() else text
