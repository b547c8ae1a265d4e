"""Every command of the documents is one that its parser accepts."""

import shlex

import pytest
from tests.docs.markdown import ROOT, fenced_blocks

from fusion_hf.cli import make_parser

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PROGRAM = "fusion-hf"
MODULE = ["-m", "fusion_hf"]


def commands_of(page: str) -> list[list[str]]:
    """Arguments of this package's program, also where a launcher starts it."""
    lines = [shlex.split(line, comments=True) for block in fenced_blocks(page, "bash") for line in block.splitlines()]
    found = [words[1:] for words in lines if words[:1] == [PROGRAM]]
    for words in lines:
        if MODULE[1] in words and words[words.index(MODULE[1]) - 1] == MODULE[0]:
            found.append(words[words.index(MODULE[1]) + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str):
    for words in commands_of(page):
        make_parser().parse_args(words)


def test_there_are_some():
    assert len(commands_of("docs/training.md")) > 10
    assert ["train", "configs/recipes/fusion-3b/stage2.yaml"] in commands_of("docs/training_gpus.md")
