"""`fusion-hf maps` answers, and writes what the model looked at."""

from pathlib import Path

import pytest

QUESTION = "what color is the shape?"


def test_answers_and_draws(run, image_path, tmp_path: Path):
    folder = tmp_path / "maps"
    result = run("maps", image_path, QUESTION, "--output", folder, "--layer-groups", 1)
    assert (result.returncode, result.stderr) == (0, "")
    answer, *paths = result.stdout.splitlines()
    assert answer == "red"
    assert sorted(paths) == sorted(map(str, folder.iterdir()))
    assert {Path(path).name for path in paths} >= {
        "question-02-color.png",
        "latents-01-turn-1.png",
        "answer-01-red.png",
    }


def test_without_matplotlib(run_here, image_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fusion_hf.common.extras.find_spec", lambda name: None)
    result = run_here("maps", image_path, QUESTION, "--output", tmp_path / "maps")
    assert result.returncode == 2
    assert "fusion_hf[maps]" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("docs/assets/red_circle.png", " "), "question is empty"),
        (("nowhere.png", QUESTION), "nowhere.png"),
        (
            ("docs/assets/red_circle.png", QUESTION, "--layer-groups", 0),
            "argument --layer-groups: must be a whole number from 1, got '0'",
        ),
        (
            ("docs/assets/red_circle.png", QUESTION, "--output", "docs"),
            "--output must be a new or an empty folder, got docs",
        ),
        (
            ("docs/assets/red_circle.png", QUESTION, "--output", "README.md"),
            "--output must be a new or an empty folder, got README.md",
        ),
    ],
)
def test_wrong_arguments(run_here, arguments: tuple, message: str):
    result = run_here("maps", *arguments)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""
