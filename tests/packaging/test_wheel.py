"""The wheel has every file of the package: what is not code is named in setup.cfg, and easily forgotten."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fusion_hf.cli.argument_types import config_file

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


def test_the_repository_s_configs_are_in_the_wheel(wheel: Path):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert len(files) > 30
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(files - {name.removeprefix(f"{PACKAGE}/") for name in archive.namelist()}) == []


def test_bundled_configs_are_found_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file of the user's goes first; no path leads out of the folder."""
    monkeypatch.chdir(tmp_path)
    name = "configs/recipes/fusion-nano/stage1.yaml"
    assert Path(config_file(name)).read_bytes() == (ROOT / name).read_bytes()
    for other in ("configs/none.yaml", "configs/../hub/family.py", "hub/family.py"):
        assert config_file(other) == other
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert config_file(name) == name


def test_published_table_is_found_in_the_wheel(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from fusion_hf.hub import family; print(family.__file__, len(family.published_rows()))"
    own = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=own, capture_output=True, encoding="utf-8")
    assert done.stdout.split() == [str(tmp_path / PACKAGE / "hub/family.py"), "19"], done.stderr
