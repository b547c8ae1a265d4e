"""Turns the Markdown in docstrings, as transformers writes it, into what Sphinx reads."""

import re
from collections.abc import Iterator
from typing import Any

FENCE = re.compile(r"(\s*)```(\w*)\s*$")
REFERENCE = re.compile(r"\[(`[^`]+`)\](?!\()")  # transformers' [`ClassName`]
STARS = re.compile(r"(?<![\w`*\\])(\*{1,2})(?=[a-z_]+\b(?!\*))")  # of *args and **kwargs


def read_markdown(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Replace the lines of a docstring in place; Sphinx calls this for each (`autodoc-process-docstring`)."""
    lines[:] = list(convert(lines))


def convert(lines: list[str]) -> Iterator[str]:
    """Convert fenced blocks, references and stars, line by line."""
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
