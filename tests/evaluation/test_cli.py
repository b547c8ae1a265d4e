"""The command's errors, none of which needs lmms-eval."""

import json
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
        (["--tasks", "easy_vqa,mmbnch"], "`--tasks` must be all, or some of mmbench_en, "),
        (["--tasks", "easy_vqa", "--data-root", "nowhere"], "`--data-root` must be a folder, got nowhere."),
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
        (["--dtype", "bfloat16"], "`--dtype` is not allowed with `--url` (the server decides), got bfloat16."),
        (["--device", "cpu"], "`--device` is not allowed with `--url` (the server decides), got cpu."),
        (["--batch-size", "8"], "`--batch-size` is not allowed with `--url` (use `--concurrency` instead), got 8."),
    ],
)
def test_what_a_server_decides(arguments, message, capsys):
    assert main(["evaluate", "--tasks", "easy_vqa", "--url", "http://127.0.0.1:9/v1", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("option", ["--api-key-env", "--concurrency"])
def test_options_of_a_server_need_one(option, capsys):
    assert main(["evaluate", "--tasks", "easy_vqa", option, "7"]) == 2
    assert capsys.readouterr().err.startswith(f"error: `{option}` is only allowed with `--url`, got 7.")


def test_data_is_checked_without_lmms_eval(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    assert main(["evaluate", "--tasks", "easy_vqa", "--dry-run"]) == 0
    assert capsys.readouterr().out == "easy_vqa: all there\n"
    assert main(["evaluate", "--tasks", "easy_vqa", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"fine": True, "problems": {"easy_vqa": []}}
