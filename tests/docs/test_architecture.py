"""The sizes in docs/architecture.md are those of the configurations, and its names are in the code."""

import re
from pathlib import Path

import pytest

from fusion_hf import FusionConfig
from fusion_hf.inference import nano_path


def table(root: Path) -> list[list[str]]:
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| .+ \| `(.+)` \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    return [list(row) for row in rows]


@pytest.mark.parametrize(("column", "path"), [(1, "configs/models/fusion-3b.json"), (2, nano_path())])
def test_sizes(root: Path, column: int, path: str):
    config = FusionConfig.from_pretrained(root / path)
    rows = table(root)
    assert len(rows) == 10
    for row in rows:
        value = config
        for name in row[0].split("."):
            value = getattr(value, name)
        assert int(row[column]) == (len(value) if isinstance(value, list) else value), row[0]


def test_names_exist(root: Path):
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = root / "src" / "fusion_hf"
    code = "".join(file.read_text(encoding="utf-8") for file in package.rglob("*.py"))
    names = re.findall(r"`(_?[A-Za-z]\w*(?:/\w+)*(?:\.\w+)*)`", text)
    files = [name for name in names if "/" in name or name.endswith(".py") or (root / name).is_file()]
    assert [name for name in files if not any((place / name).exists() for place in (package, root))] == []
    identifiers = {part for name in names if name not in files for part in name.split(".")}
    assert sorted(name for name in identifiers if not re.search(rf"\b{name}\b", code)) == []
