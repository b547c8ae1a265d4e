"""The examples at the end of each command's help are command lines, and those that can run at once run."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from tests.helpers.forked import run_forked
from tests.helpers.questions import write_questions

from fusion_hf.cli import COMMANDS, make_parser
from fusion_hf.cli.parser import Parser

PHOTO = Path(__file__).parents[2] / "docs" / "assets" / "red_circle.png"
# what they begin with; each leaves what a later one reads
RUN = (
    "fusion-hf ask ",
    "fusion-hf chat photo.jpg",
    "fusion-hf cache",
    "fusion-hf data check records.json",
    "fusion-hf init-recipe records.json",
    "fusion-hf plan recipe.yaml",
)
PLACEHOLDERS = ("DIR_OR_REPO", "starriver030515/", "OWNER/NAME", "a.jsonl")


def parsers() -> dict[str, Parser]:
    """All parsers with their commands' names."""
    commands = make_parser().commands.choices
    inner = commands["data"].commands.choices["check"]
    return {**commands, "data": inner}


def examples() -> list[str]:
    return [line for parser in (make_parser(), *parsers().values()) for line in parser.examples]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_ends_with_examples(name: str):
    parser = parsers()[name]
    assert parser.examples
    assert parser.format_help().rstrip().endswith(parser.examples[-1])
    for line in parser.examples:
        assert line.startswith(f"fusion-hf {name} ") or line == f"fusion-hf {name}"


def test_examples_can_be_parsed():
    for line in examples():
        make_parser().parse_args(shlex.split(line)[1:])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the examples name."""
    write_questions(tmp_path, 3)
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    turns = [{"from": "human", "value": "what color is it?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": number, "conversations": turns} for number in range(20)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    return tmp_path


def run_example(line: str, folder: Path) -> None:
    result = run_forked(shlex.split(line)[1:], folder)
    assert result.returncode == 0, (line, result.stdout, result.stderr)


def test_the_first_example_runs(folder: Path):
    run_example(examples()[0], folder)


@pytest.mark.slow
def test_examples_run(folder: Path):
    lines = [line for line in dict.fromkeys(examples()) if line.startswith(RUN)]
    lines = [line for line in lines if not any(word in line for word in PLACEHOLDERS)]
    assert len(lines) > len(RUN)
    for line in lines:
        run_example(line, folder)


def test_help_groups_all_commands():
    parser = make_parser()
    assert [name for names in parser.groups.values() for name in names] == list(COMMANDS)
    text = parser.format_help()
    assert all(f"\n{title}:\n" in text for title in parser.groups)


def test_help_of_evaluate_lists_the_tasks():
    from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS

    listed = " ".join(make_parser().commands.choices["evaluate"].format_help().split())
    assert ", ".join(BENCHMARKS) in listed and ", ".join(VARIANTS) in listed
