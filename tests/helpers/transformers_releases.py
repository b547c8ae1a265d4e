"""Other releases of transformers beside the installed one, for processes that a test starts."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement

CACHE_VARIABLE = "FUSION_HF_RELEASES_CACHE"
INSTALL_SECONDS = 600
# the last release of each supported minor version
RELEASES = ("5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")
LAST_FOR_PYTHON_3_10 = "5.20.2"
BOUND = ("huggingface-hub", "tokenizers")


def supported_releases() -> list[str]:
    """The releases that can be installed for the running Python."""
    if sys.version_info >= (3, 11):
        return list(RELEASES)
    return [release for release in RELEASES if release <= LAST_FOR_PYTHON_3_10]


def install_release(version: str) -> Path:
    """
    Install one release of transformers into a folder of its own, once.

    What it does not bind to itself comes from the running environment, so that little is downloaded.

    Returns:
        A folder for the front of PYTHONPATH.
    """
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path(__file__).parents[1] / "hub" / ".cache")
    folder = cache / f"transformers-{version}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):  # test processes start together
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                target = Path(scratch) / "target"
                _install(target, f"transformers=={version}")
                _install(target, *_bound_to_release(target))
                shutil.move(target, folder)
    return folder


def _install(target: Path, *requirements: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(target))
    command = [sys.executable, "-m", "pip", "install", *options, *requirements]
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS)


def _bound_to_release(target: Path) -> list[str]:
    """The requirements of the transformers in `target` that each release bounds otherwise."""
    (release,) = importlib.metadata.distributions(name="transformers", path=[str(target)])
    requirements = map(Requirement, release.requires or ())
    return [str(r) for r in requirements if r.name.replace("_", "-") in BOUND and r.marker is None]
