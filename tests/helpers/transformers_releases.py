"""Other releases of transformers beside the installed one, for processes that a test starts."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

CACHE_VARIABLE = "FUSION_HF_RELEASES_CACHE"
INSTALL_SECONDS = 600
# the last release of each supported minor version
RELEASES = ("5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")
LAST_FOR_PYTHON_3_10 = "5.20.2"


def supported_releases() -> list[str]:
    """The releases that can be installed for the running Python."""
    if sys.version_info >= (3, 11):
        return list(RELEASES)
    return [release for release in RELEASES if release <= LAST_FOR_PYTHON_3_10]


def install_release(version: str) -> Path:
    """
    Install one release of transformers into a folder of its own, once.

    Everything else comes from the running environment, so that nothing is downloaded twice.

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
                pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
                subprocess.run(
                    [*pip, "--target", str(target), f"transformers=={version}"], check=True, timeout=INSTALL_SECONDS
                )
                shutil.move(target, folder)
    return folder
