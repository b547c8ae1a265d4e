"""Types of arguments; imports nothing heavy."""

import argparse
from math import isqrt


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
    if number == 0 or isqrt(number) ** 2 != number:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a perfect square (1, 4, 9, 16, ...)")
    return number
