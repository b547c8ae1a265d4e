"""Convert the Markdown in docstrings, which follows transformers, to the reStructuredText that Sphinx reads."""

import re
from collections.abc import Iterator
from typing import Any

FENCE = re.compile(r"(\s*)```(\w*)\s*$")
REFERENCE = re.compile(r"\[(`[^`]+`)\](?!\()")  # transformers' [`ClassName`]
STARS = re.compile(r"(?<![\w`*\\])(\*{1,2})(?=[a-z_]+\b(?!\*))")  # of *args and **kwargs


def read_markdown(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """
    Convert a docstring in place. Sphinx calls this function for each docstring (`autodoc-process-docstring`).

    Args:
        app, what, name, obj, options: Arguments of the event, which are not used.
        lines: The lines of the docstring. They are replaced.
    """
    lines[:] = list(convert(lines))


def convert(lines: list[str]) -> Iterator[str]:
    """
    Convert fenced blocks, references and stars, line by line.

    Args:
        lines: Lines of a docstring in Markdown.

    Yields:
        The same lines in reStructuredText.
    """
    is_code = False
    for line in lines:
        fence = FENCE.match(line)
        if fence and not is_code:
            is_code = True
            yield from ("", f"{fence[1]}.. code-block:: {fence[2] or 'text'}", "")
        elif fence:
            is_code = False
            yield ""
        elif is_code:
            yield f"    {line}"
        else:
            yield STARS.sub(lambda match: match[1].replace("*", r"\*"), REFERENCE.sub(r"\1", line))
