"""The source distribution and the wheel that is built from it, installed and used outside of the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from setuptools import build_meta

ROOT = Path(__file__).parents[2]


def run(*command: object, cwd: Path) -> str:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=own, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_built_installed_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the source distribution, as PyPI's users without a wheel would install it."""
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if not name.startswith("tests/") and (ROOT / name).exists():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name, follow_symlinks=False)
    monkeypatch.chdir(tmp_path / "source")
    archive = tmp_path / build_meta.build_sdist(str(tmp_path))
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")

    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    run(*pip, "--python", environment, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # torch and transformers of this environment, but not its editable installation of the package
    (purelib,) = environment.glob("lib/python*/site-packages")
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib"), "utf-8")

    where = run(environment / "bin/python", "-c", "import fusion_hf; print(fusion_hf.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert (purelib / "fusion_hf/py.typed").is_file()
    image = shutil.copy(ROOT / "docs/assets/red_circle.png", tmp_path / "image.png")
    answer = run(environment / "bin/fusion-hf", "ask", image, "what color is the shape?", cwd=tmp_path)
    assert answer.strip() == "red"
    recipe = "configs/recipes/fusion-3b/stage1.yaml"
    plan = run(environment / "bin/fusion-hf", "plan", recipe, "--gpus", 8, "--json", cwd=tmp_path)
    assert json.loads(plan)
