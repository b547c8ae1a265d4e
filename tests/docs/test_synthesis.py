"""The configurations of docs/synthesis.md are ones that the command accepts, and its code runs."""

from pathlib import Path

import pytest
import yaml
from tests.docs.markdown import ROOT, fenced_blocks

from fusion_hf.synthesis.run_config import load_config

DOCUMENT = "docs/synthesis.md"
MIX = ROOT / "configs" / "synthesis" / "mix.yaml"


@pytest.mark.parametrize("block", fenced_blocks(DOCUMENT, "yaml"))
def test_sections_of_a_config(block: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(MIX.read_text()), **yaml.safe_load(block)}))
    load_config(path)


@pytest.mark.parametrize("block", fenced_blocks(DOCUMENT, "python"))
def test_python_blocks(block: str, capsys: pytest.CaptureFixture[str]):
    exec(compile(block, DOCUMENT, "exec"), {})
    assert capsys.readouterr().out


def test_there_are_some():
    assert fenced_blocks(DOCUMENT, "python") and len(fenced_blocks(DOCUMENT, "yaml")) >= 3
