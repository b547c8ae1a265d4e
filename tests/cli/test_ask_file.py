"""`fusion-hf ask --input`: a file of questions, in real processes."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from tests.helpers.questions import write_questions

from fusion_hf.inference.batching import batch_generate

COUNT = 9
QUESTION = "what color is the shape?"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path, COUNT)[0]


def test_answers_a_file(run, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    result = run("ask", "--input", questions, "--output", output, "--batch-size", 2, "--query-len", 4)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{output}: {COUNT} answers\n", "")
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers == batch_generate(questions, query_len=4)

    again = run("ask", "--input", questions, "--output", output)
    assert (again.returncode, again.stdout) == (2, "")
    assert (
        again.stderr.startswith(f"error: `output` must be a new file, got {output}") and again.stderr.count("\n") == 1
    )


def test_errors_are_counted(run, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    lines = [*questions.read_text().splitlines(), "{", json.dumps({"image": "nowhere.png", "question": QUESTION})]
    questions.write_text("\n".join(lines))
    result = run("ask", "--input", questions, "--output", output)
    assert (result.returncode, result.stdout) == (1, f"{output}: {COUNT} answers\n")
    assert result.stderr == f"error: 2 of {COUNT + 2} records could not be answered; {output} says why.\n"
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["answer" in answer for answer in answers] == [True] * COUNT + [False] * 2
    assert answers[-2]["error"].startswith(f"line {COUNT + 1}: ")


def test_progress_on_a_terminal(command, offline, questions, tmp_path):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    arguments = ["ask", "--input", questions, "--output", tmp_path / "answers.jsonl"]
    with subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=writer, env=offline
    ) as p:
        os.close(writer)
        shown = b""
        while True:
            try:
                shown += os.read(reader, 4096)
            except OSError:  # of a terminal whose process is over
                break
    os.close(reader)
    assert p.returncode == 0
    assert f"{COUNT}/{COUNT}".encode() in shown
    assert b"record" in shown


def test_locked_by_another_process(run, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    with (tmp_path / "answers.jsonl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run("ask", "--input", questions, "--output", output)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: Another process is writing") and str(output) in result.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--input", "a.jsonl", "--also", QUESTION], "`--also` cannot be combined with `--input`"),
        (["--input", "a.jsonl"], "`--output` is required with `--input`"),
        (
            ["picture.png", "--input", "a.jsonl", "--output", "b.jsonl"],
            "an image or a question, got 'picture.png'",
        ),
        (
            ["p.png", QUESTION, "--input", "a.jsonl", "--output", "b.jsonl"],
            "an image or a question, got 'p.png'",
        ),
        (
            ["--input", "a.jsonl", "p.png", "--output", "b.jsonl"],
            "an image or a question, got 'p.png'",
        ),
        (["picture.png", QUESTION, "--output", "b.jsonl"], "`--output` is only allowed with `--input`, got b.jsonl"),
        (["picture.png", QUESTION, "--batch-size", "4"], "`--batch-size` is only allowed with `--input`, got 4"),
        (["--input", "no.jsonl", "--output", "b.jsonl"], "no.jsonl cannot be read (No such file or directory)"),
        (["--input", "docs", "--output", "b.jsonl"], "docs cannot be read (Is a directory)"),
        (["--input", "README.md", "--output", "no/b.jsonl"], "must be in an existing folder, got no/b.jsonl"),
        (["--input", "README.md", "--output", "README.md"], "must be a new file, got README.md, which exists"),
    ],
)
def test_wrong_command_lines(run_here, arguments, part):
    result = run_here("ask", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert part in result.stderr


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--batch-size", "many"], ["--input"]])
def test_wrong_values(run, arguments):
    result = run("ask", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert arguments[0] in result.stderr
