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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bfloat16"], "--dtype is bfloat16; not allowed with --url: the server has chosen it."),
        (["--device", "cpu"], "--device is cpu; not allowed with --url: the server has chosen it."),
        (["--batch-size", "8"], "--batch-size is 8; not allowed with --url: --concurrency says"),
    ],
)
def test_what_a_server_decides(arguments, message, capsys):
    assert main(["evaluate", "--tasks", "easy_vqa", "--url", "http://127.0.0.1:9/v1", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("option", ["--api-key-env", "--concurrency"])
def test_options_of_a_server_need_one(option, capsys):
    assert main(["evaluate", "--tasks", "easy_vqa", option, "7"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option} is 7; allowed only with --url")


def test_data_is_checked_without_lmms_eval(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    assert main(["evaluate", "--tasks", "easy_vqa", "--dry-run"]) == 0
    assert capsys.readouterr().out == "easy_vqa: all there\n"
