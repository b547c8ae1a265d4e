"""The error for invalid input. This module imports nothing."""

LONGEST_NAME = 80  # characters: the name of an image may be a data URI


class InputError(ValueError):
    """
    An image, question, model or setting is invalid and the user can correct it. The message says how, in one line.

    Attributes:
        longest: Maximum number of characters that a command shows; a library may list every tensor of a model.
    """

    longest = 600


def short_name(name: str) -> str:
    """Shorten a name for an error message."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
