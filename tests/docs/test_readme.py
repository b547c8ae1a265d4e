"""The snippets of the documents for users run, and their commands exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import generated_pages
import pytest
from tests.docs.markdown import ROOT, fenced_blocks
from tests.helpers.forked import run_forked

from fusion_hf.cli import make_parser

SECONDS = 600
MARKER = "# needs "  # a line that has it is parsed instead of run
EXPECTED = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def test_python_block_runs(python_block: str, workspace: Path):
    """In a forked process, which has imported everything: so the block must import this package itself."""
    assert re.search("^(import|from) fusion_hf", python_block, re.MULTILINE)
    result = run_forked([python_block], workspace, is_code=True)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    for expected in EXPECTED.findall(python_block):
        assert expected in printed


def test_first_block_runs_in_a_fresh_process(workspace: Path):
    """Importing this package is what makes the auto classes know FUSION."""
    block = fenced_blocks("README.md", "python")[0]
    command = [sys.executable, "-c", block]
    result = subprocess.run(
        command, cwd=workspace, env=OFFLINE, capture_output=True, encoding="utf-8", timeout=SECONDS
    )
    assert result.returncode == 0, result.stderr
    assert EXPECTED.findall(block) == ["red"] == result.stdout.splitlines()


def test_bash_line(bash_line: str, workspace: Path, root: Path):
    words = shlex.split(bash_line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    elif MARKER in bash_line:
        parse(words)
    else:
        assert words[0] == "fusion-hf"
        result = run_forked(words[1:], workspace)
        assert result.returncode == 0, result.stderr
        output = result.stdout
        assert output or words[1] == "chat"  # which is told nothing here


def parse(words: list[str]) -> None:
    """Let the command's own parser read its arguments."""
    assert words[0] == "fusion-hf"
    make_parser().parse_args(words[1:])


def test_expectations_are_found(root: Path):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert EXPECTED.findall(text) == ["red"] * 2


HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/benchmarks").glob("*.md")])
DOCUMENTS = ["README.md", *(path.relative_to(ROOT).as_posix() for path in PAGES)]
GENERATED = ROOT / "docs" / generated_pages.FOLDER  # written when the site is built


def read(document: Path) -> str | None:
    """The text of a page, also of one that is made from the code; None of what does not exist."""
    if document.parent == GENERATED:
        return generated_pages.make_pages().get(document.name)
    return document.read_text(encoding="utf-8") if document.is_file() else None


def anchors(text: str) -> set[str]:
    titles = HEADING.findall(text)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str, root: Path):
    text = (root / document).read_text(encoding="utf-8")
    targets = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]
    for target in targets:
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            led_to = ((root / document).parent / name).resolve() if name else root / document
            exists = led_to.exists() if led_to.parent != GENERATED else read(led_to) is not None
            assert exists, target
            assert not anchor or anchor in anchors(read(led_to) or ""), target
