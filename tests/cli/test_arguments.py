"""Options and other arguments in any order."""

from pathlib import Path

import pytest
from tests.helpers.light_runs import run_light

from fusion_hf.cli import make_parser


@pytest.mark.parametrize(
    "line",
    [
        "synthesize mix.yaml --backend procedural records=50 seed=1",
        "synthesize --backend procedural mix.yaml records=50 seed=1",
        "synthesize mix.yaml records=50 --backend procedural seed=1",
        "synthesize mix.yaml records=50 seed=1 --backend procedural",
        "plan mix.yaml --gpus 2 records=50 --json seed=1",
        "plan --json mix.yaml records=50 --gpus 2 seed=1",
        "train mix.yaml --debug records=50 seed=1",
        "train --debug mix.yaml records=50 seed=1",
    ],
)
def test_options_stand_anywhere(line: str):
    arguments = make_parser().parse_args(line.split())
    assert arguments.overrides == ["records=50", "seed=1"]
    assert "mix.yaml" in vars(arguments).values()
    assert arguments.command == line.split()[0]


def test_options_between_images():
    arguments = make_parser().parse_args(["ask", "a.png", "--device", "cpu", "b.png", "--also", "where?", "what?"])
    assert (arguments.images, arguments.question, arguments.also) == (["a.png", "b.png"], "what?", ["where?"])


def test_a_question_that_begins_like_an_option():
    arguments = make_parser().parse_args(["ask", "--device", "cpu", "a.png", "--", "--what?"])
    assert (arguments.images, arguments.question) == (["a.png"], "--what?")


def test_a_file_of_questions_needs_no_image():
    arguments = make_parser().parse_args(["ask", "--input", "q.jsonl", "--output", "a.jsonl"])
    assert not arguments.images and arguments.question is None


def test_arguments_of_vllm():
    arguments = make_parser().parse_args(["serve", "--engine", "vllm", "--", "--seed", "1"])
    assert arguments.engine_arguments == ["--seed", "1"]


def test_wrong_arguments(tmp_path: Path):
    lines = ("plan a.yaml --bogus b=1", "ask a.png", "data", "data check", "paint", "train")
    parts = ("--bogus", "QUESTION", "COMMAND", "MIXTURE_OR_FILE", "paint", "RECIPE.yaml")
    for result, part in zip(run_light(tmp_path, [line.split() for line in lines]), parts, strict=True):
        assert (result.status, result.out, result.error.count("\n")) == (2, "", 1)
        assert part in result.error and "--help" in result.error
