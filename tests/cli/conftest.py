"""Fixtures that run the command as its users do: in a process of its own."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from tests.helpers.forked import run_forked

from fusion_hf.cli import main

ROOT = Path(__file__).parents[2]
SECONDS = 300  # a hung process fails its test instead of stopping all

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command() -> list[str]:
    return [sys.executable, "-m", "fusion_hf"]


@pytest.fixture(scope="session")
def offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs `fusion-hf` with arguments, and optionally text on its standard input, in a forked process."""
    return lambda *arguments, stdin="": run_forked(arguments, ROOT, stdin)


@pytest.fixture(scope="session")
def run_cold(command: list[str], offline: dict[str, str]) -> Run:
    """The same with an interpreter of its own, which may have other environment variables."""

    def run(*arguments: object, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)],
            input=stdin,
            env={**offline, **variables},
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
        )

    return run


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The same without a process, where it is only about a message: a process takes seconds to import torch."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse's way
            status = int(stopped.code or 0)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(list(arguments), status, printed.out, printed.err)

    monkeypatch.chdir(ROOT)
    verbosity = transformers.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
    with warnings.catch_warnings():
        yield run
    transformers.logging.set_verbosity(verbosity[0])
    huggingface_hub.logging.set_verbosity(verbosity[1])
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def image_path() -> str:
    return "docs/assets/red_circle.png"


@pytest.fixture(scope="session")
def nano() -> Path:
    """The bundled model: without it the command has no default, so its absence is an error."""
    folder = ROOT / "src" / "fusion_hf" / "checkpoints" / "fusion-nano"
    assert (folder / "model.safetensors").is_file(), "the bundled fusion-nano is missing"
    return folder
