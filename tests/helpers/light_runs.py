"""Runs of `fusion-hf` in processes that can import neither torch nor transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120
# Found as they are, since it costs nothing to ask whether a package is there, but not imported.
REFUSE = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

class Refusing(Loader):
    def create_module(self, spec):
        raise RuntimeError(f"{spec.name} was imported")

class Heavy(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers"):
            spec = PathFinder.find_spec(name, path, target)
            spec.loader = Refusing()
            return spec

sys.meta_path.insert(0, Heavy())
"""
# Many command lines in one process, since a start takes longer than most of them.
DRIVER = """
import contextlib, io, json, sys
from fusion_hf.cli import main
results = []
for name, *arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([name, *arguments])
        except SystemExit as exit:
            status = exit.code
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Result:
    """What a command line gave."""

    status: int
    out: str
    error: str


def light_environment(folder: Path, **variables: str) -> dict[str, str]:
    """
    An environment in which an import of a heavy package fails.

    Args:
        folder: gets what refuses it.
    """
    customized = folder / "refuse"
    customized.mkdir(exist_ok=True)
    (customized / "sitecustomize.py").write_text(REFUSE)
    return {**os.environ, "PYTHONPATH": str(customized), "HF_HUB_OFFLINE": "1", **variables}


def run_light(folder: Path, commands: Sequence[Sequence[object]], **variables: str) -> list[Result]:
    """What command lines give, in `folder`."""
    lines = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, lines],
        cwd=folder,
        env=light_environment(folder, **variables),
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return [Result(*result) for result in json.loads(done.stdout.splitlines()[-1])]
