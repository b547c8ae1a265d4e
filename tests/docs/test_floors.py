"""Imports go downwards: docs/architecture.md says on which floor a folder is, and import statements keep to it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "fusion_hf"
ROW = re.compile(r"^\| (\d+) \| `(\w+)` \| .+ \|$", re.MULTILINE)
FROM_THE_TOP = {"__version__"}  # what modules of all floors may take from the package itself
COMPOSING = ("", "cli")  # the package itself and the commands use what is public of a folder
COPIED = ("model",)  # whose modules go where the other folders are not
NO_CODE = "checkpoints"  # a model folder's copies


def floors(root: Path) -> dict[str, int]:
    """Folder -> floor, as the document has them."""
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    return {folder: int(floor) for floor, folder in ROW.findall(text)}


def modules(source: Path) -> dict[str, Path]:
    """Dotted name -> file, of all modules below `source`."""
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if NO_CODE not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports of the package, in functions and for types too: modules, or `fusion_hf.NAME`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module.partition(".")[0] == PACKAGE:
                for alias in node.names:
                    full = f"{module}.{alias.name}"
                    yield full if full in known or module == PACKAGE else module


def upward_arrows(source: Path, floor_of: dict[str, int]) -> list[str]:
    """Imports of a folder that is not below the importing one."""
    known = modules(source)
    arrows = []
    for name, path in known.items():
        folder = name.split(".")[1] if "." in name else ""
        if folder not in floor_of:  # the package's own two files are above all floors
            continue
        for target in imported(name, path, known):
            above, _, rest = target.partition(".")
            other = rest.partition(".")[0]
            if rest in FROM_THE_TOP or other == folder:
                continue
            if floor_of.get(other, len(floor_of)) >= floor_of[folder]:
                arrows.append(f"{name} -> {above}.{rest}")
    return arrows


def test_each_folder_is_on_one_floor(root: Path):
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = [folder for _, folder in ROW.findall(text)]
    package = root / "src" / PACKAGE
    folders = {path.parent.relative_to(package).parts[0] for path in package.glob("*/**/*.py")} - {NO_CODE}
    assert sorted(listed) == sorted(folders)


def test_no_module_lies_loose(root: Path):
    assert {path.name for path in (root / "src" / PACKAGE).glob("*.py")} == {"__init__.py", "__main__.py"}


def test_imports_go_downwards(root: Path):
    assert upward_arrows(root / "src", floors(root)) == []


@pytest.mark.parametrize(
    ("line", "is_upward"),
    [
        ("from fusion_hf.high import thing", True),
        ("from fusion_hf.high.module import thing", True),
        ("import fusion_hf.high.module", True),
        ("from fusion_hf import high", True),
        ("from ..high import thing", True),
        ("def late():\n    from fusion_hf.high.module import thing", True),
        ("from fusion_hf.beside import thing", True),
        ("from fusion_hf import public_name", True),
        ("import fusion_hf", True),
        ("from fusion_hf import __version__", False),
        ("from fusion_hf.ground.module import thing", False),
        ("from .other import thing", False),
    ],
)
def test_an_upward_arrow_is_found(tmp_path: Path, line: str, is_upward: bool):
    """An arrow of each kind, alone in a small package."""
    for folder in ("ground", "middle", "beside", "high"):
        (tmp_path / PACKAGE / folder).mkdir(parents=True)
        (tmp_path / PACKAGE / folder / "__init__.py").touch()
        (tmp_path / PACKAGE / folder / "module.py").touch()
    (tmp_path / PACKAGE / "__init__.py").touch()
    (tmp_path / PACKAGE / "middle" / "module.py").write_text(line + "\n")
    arrows = upward_arrows(tmp_path, {"ground": 0, "middle": 1, "beside": 1, "high": 2})
    assert [arrow.partition(" ")[0] for arrow in arrows] == ["fusion_hf.middle.module"] * is_upward


def misplaced_modules(source: Path) -> list[str]:
    """Modules that one other folder imports and nobody else: that folder is their place."""
    known = modules(source)
    importers: dict[str, set[str]] = {name: set() for name, path in known.items() if path.name != "__init__.py"}
    for name, path in known.items():
        for target in imported(name, path, known):
            if target in importers:
                importers[target].add(name.split(".")[1] if "." in name else "")
    return [
        f"{name} is of {min(folders)}"
        for name, folders in importers.items()
        if len(folders) == 1 and not folders & {name.split(".")[1], *COMPOSING} and name.split(".")[1] not in COPIED
    ]


def test_no_module_is_of_another_folder(root: Path):
    assert misplaced_modules(root / "src") == []


def test_a_misplaced_module_is_found(tmp_path: Path):
    for folder in ("low", "high"):
        (tmp_path / PACKAGE / folder).mkdir(parents=True)
    for name in ("low/elsewhere.py", "low/own.py", "low/public.py"):
        (tmp_path / PACKAGE / name).touch()
    (tmp_path / PACKAGE / "__init__.py").write_text("from fusion_hf.low import public\n")
    (tmp_path / PACKAGE / "low" / "user.py").write_text("from . import own\n")
    (tmp_path / PACKAGE / "high" / "user.py").write_text("from fusion_hf.low.elsewhere import thing\n")
    assert misplaced_modules(tmp_path) == ["fusion_hf.low.elsewhere is of high"]
