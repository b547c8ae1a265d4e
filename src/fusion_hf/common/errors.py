"""The error of whoever uses a model. Imports nothing."""

LONGEST_NAME = 80  # characters: an image may be named by a data URI


class InputError(ValueError):
    """
    Something about the given image, question, model or setting that its giver can mend; says how, in one line.

    Attributes:
        longest: characters that a command shows of it; a library may list every tensor of a model.
    """

    longest = 600


def short_name(name: str) -> str:
    """Return the beginning of a name, for an error to repeat."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
