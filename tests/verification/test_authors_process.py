"""What can go wrong with the authors' code and its Python is told in one line, and nothing of it goes on."""

import shutil
import sys
import time
from pathlib import Path

import pytest
from tests.verification.conftest import STAND_IN

from fusion_hf.common.errors import InputError
from fusion_hf.verification.authors_process import (
    AuthorsEnvironment,
    check_packages,
    find_environment,
    run_worker,
)

JOB = {"threads": 1, "checkpoint": "gone", "model_type": "fusion_phi", "questions": []}
MODULE = Path("fusion") / "model" / "__init__.py"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    shutil.copytree(STAND_IN, tmp_path / "code")
    return tmp_path / "code"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_no_repository(tmp_path: Path):
    with pytest.raises(InputError, match=r"--authors-code must be .* has no fusion/model/__init__.py"):
        find_environment(tmp_path, sys.executable)


@pytest.mark.parametrize("name", ["no-such-python", "/no/such/python", "."])
def test_no_python(code: Path, name: str):
    with pytest.raises(InputError, match=r"--authors-python must be .* is not a program"):
        find_environment(code, name)


def test_environments_are_links(code: Path, tmp_path: Path):
    """A virtual environment's Python is a link, which must not be followed."""
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert find_environment(code, str(link)).python == str(link)


def test_python_without_packages(code: Path, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # without site-packages
    python.chmod(0o755)
    with pytest.raises(InputError, match=r"`import torch, transformers.*No module named 'torch'"):
        check_packages(find_environment(code, str(python)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raise KeyError('no such model')", "ended with status 1: .*KeyError: 'no such model'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"ended by signal 9 \(often because memory"),
        ("raise OSError(28, 'No space left on device')", "no space left.*TMPDIR"),
        ("raise SystemExit(3)", "ended with status 3: nothing was written"),
    ],
)
def test_crash(code: Path, folder: Path, line: str, message: str):
    (code / MODULE).write_text(line)
    with pytest.raises(InputError, match=message):
        run_worker(AuthorsEnvironment(code, sys.executable), JOB, folder, 120)


@pytest.mark.slow
def test_hang(code: Path, folder: Path):
    """What it has started ends with it."""
    started = folder / "started"
    loop = f"while true; do date +%s.%N > {started}; sleep 0.1; done"
    (code / MODULE).write_text(
        f"import subprocess\nprint('begun', flush=True)\nsubprocess.run(['sh', '-c', '{loop}'])"
    )
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"exceeded 60 s \(--timeout\).*begun"):
        run_worker(AuthorsEnvironment(code, sys.executable), JOB, folder, 60)
    assert time.monotonic() - begin < 90
    written = started.read_text()
    time.sleep(0.5)
    assert started.read_text() == written


def test_no_secrets(code: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "hf_secret")
    (code / MODULE).write_text(
        "import os, sys\nprint(sys.path[0])\n"
        "sys.exit('|'.join([str('hf_secret' in os.environ.values()), os.environ['HF_HUB_OFFLINE']]))"
    )
    with pytest.raises(InputError, match=r"False\|1"):
        run_worker(AuthorsEnvironment(code, sys.executable), JOB, folder, 120)
    assert str(code) in (folder / "worker.log").read_text()
