"""`fusion-hf demo` where it cannot begin."""

import subprocess
import sys

import pytest

from fusion_hf.cli import main

SECONDS = 120


@pytest.mark.parametrize("missing", ["gradio", "matplotlib"])
def test_without_the_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from fusion_hf.cli import main; sys.exit(main(['demo']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: The demo requires the extra `demo` (")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_impossible_ports(port, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--port", port])
    assert "whole number from 1 to 65535" in capsys.readouterr().err
