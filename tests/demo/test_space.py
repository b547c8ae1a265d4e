"""The folder of the Space: what the Hub reads of it, and what it installs."""

import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from fusion_hf.cli.model_options import MAX_NEW_TOKENS

ALLOWED_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")  # of the Hub
LONGEST_DESCRIPTION = 60  # characters, of the Hub


@pytest.fixture(scope="module")
def space(root: Path) -> Path:
    return root / "space"


def test_front_matter(space):
    values = metadata_load(space / "README.md")
    assert values["sdk"] == "gradio"
    assert values["license"] == "apache-2.0"
    assert (space / values["app_file"]).is_file()
    assert values["title"] and len(values["short_description"]) <= LONGEST_DESCRIPTION
    assert {values["colorFrom"], values["colorTo"]} <= set(ALLOWED_COLORS)
    assert int(values["sdk_version"].split(".")[0]) >= 6  # as the extra asks


def test_requirements_are_those_of_the_package_and_the_extra(space, root):
    config = ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    expected = config["options"]["install_requires"].split() + config["options.extras_require"]["demo"].split()
    assert (space / "requirements.txt").read_text().split() == expected


def test_answers_are_as_long_as_those_of_the_command(space):
    assert f"max_new_tokens={MAX_NEW_TOKENS})" in (space / "app.py").read_text()


@pytest.mark.demo
def test_the_folder_and_the_package_make_a_space(space, root, tmp_path):
    """As they are uploaded, in a process that finds the package nowhere else."""
    shutil.copytree(space, tmp_path, dirs_exist_ok=True)
    shutil.copytree(root / "src" / "fusion_hf", tmp_path / "fusion_hf")
    code = f"import app, fusion_hf; assert fusion_hf.__file__.startswith({str(tmp_path)!r}); print(app.demo.title)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "FUSION\n"
