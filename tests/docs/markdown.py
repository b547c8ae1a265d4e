"""Reads code blocks out of the documents."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fenced_blocks(document: str, language: str) -> list[str]:
    """The contents of a Markdown file's blocks of one language (an empty string: of none)."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [content for name, content in BLOCK.findall(text) if name == language]
