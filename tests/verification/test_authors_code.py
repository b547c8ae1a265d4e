"""With a checkout of the authors' repository: what their own classes save, converted, is equal; altered, it is not."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion_hf.cli import main
from fusion_hf.hub.parity import PARITY

CODE, PYTHON = "FUSION_AUTHORS_CODE", "FUSION_AUTHORS_PYTHON"
BUILDER = Path(__file__).parents[2] / "benchmarks" / "authors_checkpoint.py"
SECONDS = 600
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CODE not in os.environ or PYTHON not in os.environ,
        reason=f"needs a checkout of the authors' repository ({CODE}) and a Python with its requirements ({PYTHON})",
    ),
]


@pytest.mark.parametrize(("kind", "tower"), [("phi", "siglip"), ("llama", "siglip2")])
def test_checkpoint_of_their_classes(kind: str, tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "folder"
    command = [os.environ[PYTHON], str(BUILDER), "--code", os.environ[CODE], "--kind", kind, "--tower", tower]
    subprocess.run([*command, "--output", str(checkpoint)], check=True, timeout=SECONDS, capture_output=True)
    sizes = ["--vision-config", str(checkpoint / f"{tower}-tower")]
    assert main(["convert", "--model", str(checkpoint), *sizes, "--output", str(folder)]) == 0
    authors = ["--authors-code", os.environ[CODE], "--authors-python", os.environ[PYTHON]]
    assert main(["verify", "--model", str(folder), "--checkpoint", str(checkpoint), *sizes, *authors]) == 0
    content = json.loads((folder / PARITY).read_text())
    assert content["equal"] and len(content["questions"]) == 4
    assert content["authors"]["versions"]["transformers"].startswith("4.")

    altered = tmp_path / "altered"
    shutil.copytree(folder, altered)
    weights = load_file(altered / "model.safetensors")
    name = "model.language_model.layers.3.vision_sampler.linear_2.weight"
    weights[name] = torch.t(weights[name]).contiguous()
    save_file(weights, altered / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["verify", "--model", str(altered), "--checkpoint", str(checkpoint), *sizes, *authors]) == 1
    assert "first at: features, samplers.3 (question 1)" in capsys.readouterr().out
