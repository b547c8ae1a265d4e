"""Standard streams that are closed, broken or full, and text that is no UTF-8: one line, and status 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.light_runs import light_environment

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")

SECONDS = 120
IMAGE = Path(__file__).parents[2] / "docs" / "assets" / "red_circle.png"
ESTIMATE = "synthesize synth.yaml --dry-run"
FULL = "error: The standard output cannot be written: No space left on device.\n"
CLOSED = "error: The standard output is closed. Redirect it to a file or to /dev/null.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    (folder / "synth.yaml").write_text("output: made\nrecords: 60\nbackend: procedural\n")
    return folder


def shell(folder: Path, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell, in which `fusion-hf` is what a user has; its own standard error is kept apart."""
    quoted = f"'{sys.executable}' -m fusion_hf"
    return subprocess.run(
        ["bash", "-c", line.replace("fusion-hf", quoted)],
        cwd=folder,
        env=light_environment(folder, **variables),
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=SECONDS,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("line", "error"),
    [
        (f"fusion-hf {ESTIMATE} >&-", CLOSED),
        (f"fusion-hf {ESTIMATE} > /dev/full", FULL),
        ("fusion-hf plan --help > /dev/full", FULL),
        ("fusion-hf --version > /dev/full", FULL),
    ],
)
def test_output_that_takes_nothing(folder: Path, line: str, error: str, unbuffered: str):
    done = shell(folder, line, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_is_full_in_the_middle(folder: Path, unbuffered: str):
    """Here as a file that may have no byte more: that shows only when something is written."""
    line = f"ulimit -f 0; fusion-hf {ESTIMATE} > file"
    done = shell(folder, line, PYTHONUNBUFFERED=unbuffered)
    error = "error: The standard output cannot be written: File too large.\n"
    assert (done.returncode, done.stderr) == (2, error)


def test_nobody_reads_the_errors(folder: Path):
    for closed in ("2>&-", "2>/dev/full"):
        done = shell(folder, f"fusion-hf train gone.yaml {closed}")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
        done = shell(folder, f"fusion-hf {ESTIMATE} {closed}")
        assert done.returncode == 0 and done.stdout.startswith("records: 60 "), done


def test_files_do_not_get_the_numbers_of_closed_streams(folder: Path):
    """What a library writes to number 2 would go into the file that got that number."""
    line = f"'{sys.executable}' -c 'import os; from fusion_hf.cli.terminal import prepare_streams; prepare_streams(); "
    line += 'print(os.open("/dev/null", os.O_RDONLY) > 2)\' <&- 2>&-'
    done = shell(folder, line)
    assert done.stdout == "True\n", done


def test_no_input_to_chat_with(folder: Path):
    done = shell(folder, f"fusion-hf chat '{IMAGE}' <&-")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "standard input is closed" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    ["'IMAGE' $'what \\xff?'", "'IMAGE' what? --also $'what \\xff?'", "'IMAGE' 'IMAGE' $'\\xed\\xa0\\x80?'"],
)
@pytest.mark.parametrize("command", ["ask", "maps"])
def test_a_question_that_is_no_utf8(folder: Path, command: str, arguments: str):
    if command == "maps" and ("--also" in arguments or arguments.count("IMAGE") > 1):
        arguments = "'IMAGE' $'\\xff'"
    done = shell(folder, f"fusion-hf {command} {arguments.replace('IMAGE', str(IMAGE))}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "question must be UTF-8 text" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "fusion-hf train $'\\xff.yaml'",
        "fusion-hf plan synth.yaml $'\\xff=1'",
        "fusion-hf export --output new --model $'./\\xff'",
        "fusion-hf ask $'\\xff.png' what?",
        "fusion-hf convert --model $'\\xff' --output new",
        "fusion-hf synthesize synth.yaml $'output=\\xff/x' $'pool=\\xff'",
    ],
)
def test_names_that_are_no_utf8(folder: Path, line: str):
    done = shell(folder, line)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("error: ") and "--debug" not in done.stderr
