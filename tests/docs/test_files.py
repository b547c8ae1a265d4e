"""The README is short, and the table of folders in docs/architecture.md is complete."""

import re
import subprocess
from pathlib import Path

import pytest

MAX_README_LINES = 200
ROW = re.compile(r"^\| (`[^|]+`) \| [^|]+ \|$", re.MULTILINE)
SINGLE_FILES = {
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
}
SETTINGS = {".gitignore", ".pre-commit-config.yaml"}


def described(root: Path) -> set[str]:
    """What the first table of the section names: folders end with a slash."""
    text = (root / "docs/architecture.md").read_text("utf-8")
    section = text.partition("## Folders")[2].partition("`src/fusion_hf` has one folder")[0]
    return {name.strip("`") for row in ROW.findall(section) for name in row.split(", ")}


def test_readme_is_short(root: Path):
    assert len((root / "README.md").read_text("utf-8").splitlines()) <= MAX_README_LINES


def test_every_top_folder_is_described(root: Path):
    if not (root / ".git").exists():
        pytest.skip("no git repository: an unpacked archive")
    output = subprocess.run(["git", "ls-files"], cwd=root, check=True, capture_output=True, encoding="utf-8").stdout
    top = {line.split("/")[0] + ("/" if "/" in line else "") for line in output.splitlines()}
    top = {"src/fusion_hf/" if name == "src/" else name for name in top}
    assert top - described(root) - SINGLE_FILES - SETTINGS == set()


def test_everything_described_exists(root: Path):
    assert len(described(root)) > 10
    assert [name for name in described(root) if not (root / name).exists()] == []
