"""Fixtures that run the command as its users do: in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
def run(command: list[str], offline: dict[str, str]) -> Run:
    """Runs `fusion-hf` with arguments, and optionally text on its standard input and other environment variables."""

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


@pytest.fixture(scope="session")
def picture() -> str:
    return "docs/assets/red_circle.png"


@pytest.fixture(scope="session")
def nano() -> Path:
    """The bundled model: without it the command has no default, so its absence is an error."""
    folder = ROOT / "src" / "fusion_hf" / "checkpoints" / "fusion-nano"
    assert (folder / "model.safetensors").is_file(), "the bundled fusion-nano is missing"
    return folder
