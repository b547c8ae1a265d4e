"""The tutorial's commands, one after another as its reader gives them, write what the page and its images show."""

import doctest
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.markdown import fenced_blocks
from tests.helpers.hub_server import HubServer, own_environment

DOCUMENT = "docs/tutorial_own_images.md"
SECONDS = 600  # a hung process fails the test
MEASURED = ("train", "compare", "push")  # what they count differs with the machine in the last digits
FIGURE = re.compile(r"\d[\d,.]*(e-\d+)?")
HUB = "https://huggingface.co"


def commands() -> list[tuple[str, str]]:
    """Each command of the page, and what it shows of the output."""
    shown = "".join(fenced_blocks(DOCUMENT, "console"))
    return [(line, output) for line, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", shown, re.MULTILINE)]


def is_as_shown(shown: str, written: str, words: list[str]) -> bool:
    if words[1] in MEASURED:
        shown, written = FIGURE.sub("0", shown), FIGURE.sub("0", written)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(shown, written, flags)


@pytest.mark.slow
def test_every_command_writes_what_the_page_shows(tmp_path: Path) -> None:
    (script,) = fenced_blocks(DOCUMENT, "python")
    (tmp_path / "make_parts.py").write_text(script)
    programs = {"python": [sys.executable], "fusion-hf": [sys.executable, "-m", "fusion_hf"]}
    written = {}
    with HubServer() as hub:
        environment = own_environment(hub, tmp_path / "home") | {
            "PYTHONUNBUFFERED": "1"
        }  # both streams in their order
        for line, shown in commands():
            words = shlex.split(line)
            done = subprocess.run(
                [*programs[words[0]], *words[1:]],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                timeout=SECONDS,
            )
            assert done.returncode == 0, done.stdout
            written[line] = done.stdout.replace(hub.url, HUB)
            assert is_as_shown(shown, written[line], words), f"{line}\n{written[line]}"
        files = hub.state.repositories["me/parts"]

    assert len(written) == 12
    log = map(json.loads, (tmp_path / "runs/records-lora/log.jsonl").read_text().splitlines())
    accuracies = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    assert accuracies[0] == 0.5 < max(accuracies)
    (compared,) = (text for line, text in written.items() if line.startswith("fusion-hf compare"))
    first, second = map(float, re.findall(r"exact_match: ([\d.]+) and ([\d.]+),", compared)[0])
    assert first == 0.5 and second >= 0.85
    assert "records" in files["README.md"].decode() and "model.safetensors" in files
    assert (tmp_path / "changed.html").read_text().count("<article>") >= 8


def test_images_show_what_the_page_shows(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, root / "docs" / "draw_terminal.py", tmp_path], check=True)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(drawn) == 2
    for name, content in drawn.items():
        assert content == (root / "docs" / "assets" / name).read_bytes(), f"run docs/draw_terminal.py: {name}"
        assert len(content) < 100_000 and name in (root / DOCUMENT).read_text(encoding="utf-8")
    shown = b"".join(drawn.values()).decode().replace("\u00a0", " ")
    assert all(line[:20] in shown for line, _ in commands())
