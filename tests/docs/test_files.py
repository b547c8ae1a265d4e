"""The README's list of files is complete and true."""

import re
import subprocess
from pathlib import Path

import pytest
from tests.docs.markdown import fenced_blocks

INDENT = "  "
# folders that the list names with one line, whatever is in them
ONE_LINE = ("src/fusion_hf/checkpoints/fusion-nano/", "benchmarks/results/")


def listed_paths() -> dict[str, str]:
    """Path -> description of the list; folders end with a slash."""
    (block,) = (text for text in fenced_blocks("README.md", "") if "Makefile" in text)
    paths: dict[str, str] = {}
    parents: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // len(INDENT)
        name, *description = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        path = "".join(parents[:depth]) + name
        parents[depth:] = [name] if name.endswith("/") else []
        paths[path] = description[0] if description else ""
    return paths


def tracked_paths(root: Path) -> list[str]:
    """Files of the repository, committed or about to be, each named as the list is to name it."""
    if not (root / ".git").exists():
        pytest.skip("no git repository: an unpacked archive")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True, encoding="utf-8").stdout
    files = [line for line in output.splitlines() if (root / line).exists()]
    return sorted({_as_listed(file) for file in files})


def _as_listed(file: str) -> str:
    for folder in ONE_LINE:
        if file.startswith(folder):
            return folder
    parts = file.split("/")
    return f"tests/{parts[1]}/" if parts[0] == "tests" and len(parts) > 2 else file


def test_every_file_is_listed(root: Path):
    assert [path for path in tracked_paths(root) if path not in listed_paths()] == []


def test_everything_listed_exists(root: Path):
    assert [path for path in listed_paths() if not (root / path).exists()] == []


def test_every_file_is_described():
    assert [path for path, text in listed_paths().items() if not text and not path.endswith("/")] == []
