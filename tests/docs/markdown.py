"""Read code blocks from the documents."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fenced_blocks(document: str, language: str) -> list[str]:
    """Return the contents of the blocks of one language in a Markdown file (an empty string: without a language)."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [content for name, content in BLOCK.findall(text) if name == language]
