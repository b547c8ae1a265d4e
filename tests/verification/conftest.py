"""A small checkpoint, its converted folder, and a stand-in for the authors' repository, whose worker runs once."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.tokenizers import write_phi3_tokenizer

from fusion_hf.cli.convert import main as convert
from fusion_hf.conversion.inputs import ConversionOptions, find_conversion_inputs
from fusion_hf.conversion.marked_tokenizer import load_tokenizer
from fusion_hf.verification import certificate
from fusion_hf.verification.authors_process import find_environment, run_worker
from fusion_hf.verification.certificate import Certificate, VerificationOptions, verify
from fusion_hf.verification.questions import draw_questions

STAND_IN = Path(__file__).parents[1] / "fixtures" / "authors_stand_in"
VOCABULARY = 32_013  # Phi-3's tokens and the two marks
MAX_LENGTH, NUM_QUESTIONS = 4096, 2


@dataclass(frozen=True)
class Converted:
    """The authors' checkpoint, the tower's sizes beside it, and what conversion made of them."""

    checkpoint: Path
    sizes: Path
    output: Path


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("verification")
    checkpoint, sizes, output = root / "checkpoint", root / "vision_config.json", root / "output"
    write_checkpoint(checkpoint, "phi", vocab_size=VOCABULARY, rope_scaling=None, mm_use_im_patch_token=False)
    tokenizer = load_tokenizer(write_phi3_tokenizer(root / "tokenizer"), "phi3", MAX_LENGTH)
    tokenizer.add_tokens(["<vision_start>", "<vision_end>"], special_tokens=True)
    tokenizer.save_pretrained(checkpoint)
    line = ["--model", str(checkpoint), "--output", str(output), "--vision-config", str(sizes)]
    assert convert(line) == 0
    return Converted(checkpoint, sizes, output)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the stand-in's results are kept: it computes the same for each altered folder."""
    return {"folder": tmp_path_factory.mktemp("recorded")}


@pytest.fixture
def certify(
    converted: Converted, recorded: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Certificate]:
    """Compares a folder with the stand-in, whose process is started for the first one only."""
    kept = recorded["folder"]

    def run(environment: Any, job: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
        if not (kept / "report.json").exists():
            report = run_worker(environment, job, folder, seconds)
            for file in folder.glob("question_*.safetensors"):
                shutil.copy(file, kept / file.name)
            (kept / "report.json").write_text(json.dumps(report))
        for file in kept.glob("question_*.safetensors"):
            shutil.copy(file, folder / file.name)
        return json.loads((kept / "report.json").read_text())

    monkeypatch.setattr(certificate, "run_worker", run)
    monkeypatch.setattr(certificate, "check_packages", lambda environment: None)  # seconds for each test
    environment = find_environment(STAND_IN, sys.executable)

    def call(folder: Path, **changes: Any) -> Certificate:
        options = VerificationOptions(folder, str(converted.checkpoint), str(converted.sizes), **changes)
        inputs = find_conversion_inputs(ConversionOptions(options.checkpoint, None, options.vision_config))
        return verify(options, environment, inputs, draw_questions()[:NUM_QUESTIONS])

    return call


@pytest.fixture
def copy(converted: Converted, tmp_path: Path) -> Path:
    """A copy of the converted folder, to be altered."""
    shutil.copytree(converted.output, tmp_path / "folder", ignore=shutil.ignore_patterns("parity.json"))
    return tmp_path / "folder"
