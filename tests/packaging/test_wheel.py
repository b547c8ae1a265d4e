"""The wheel has every file of the package: what is not code is named in setup.cfg, and easily forgotten."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "fusion_hf"
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves files beside its source, and takes up those of an earlier one."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src" / PACKAGE, source / "src" / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", target, source]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path):
    package = ROOT / "src" / PACKAGE
    files = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        missing = files - set(archive.namelist())
    assert sorted(name for name in missing if "__pycache__" not in name) == []


def test_published_table_is_found_in_the_wheel(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from fusion_hf.hub import family; print(family.__file__, len(family.published_rows()))"
    own = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=own, capture_output=True, encoding="utf-8")
    assert done.stdout.split() == [str(tmp_path / PACKAGE / "hub/family.py"), "19"], done.stderr
