"""The command's errors, none of which needs lmms-eval."""

import sys

import pytest

from fusion_hf.cli import main


def test_without_lmms_eval_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    assert main(["evaluate", "--tasks", "easy_vqa"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "extra `eval`" in error
    assert "pip install --no-deps lmms-eval==0.7.3" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "easy_vqa,mmbnch"], "--tasks has 'mmbnch'; allowed: all, "),
        (["--tasks", "easy_vqa", "--data-root", "nowhere"], "--data-root is nowhere; allowed: a folder."),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_data_is_checked_without_lmms_eval(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    assert main(["evaluate", "--tasks", "easy_vqa", "--check-data"]) == 0
    assert capsys.readouterr().out == "easy_vqa: all there\n"
