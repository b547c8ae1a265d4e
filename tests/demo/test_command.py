"""`fusion-hf demo` where it cannot begin."""

import sys

import pytest

from fusion_hf.cli import main


@pytest.mark.parametrize("missing", ["gradio", "matplotlib"])
def test_without_the_extra(missing, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("fusion_hf.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    assert main(["demo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: fusion-hf demo needs the extra demo: pip install 'fusion_hf[demo]'")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_impossible_ports(port, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--port", port])
    assert "whole number from 1 to 65535" in capsys.readouterr().err
