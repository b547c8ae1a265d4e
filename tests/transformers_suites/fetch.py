"""Fetches transformers' own test suites: they are in its source distribution, and in no installed package."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import transformers
from filelock import FileLock

CACHE_VARIABLE = "FUSION_HF_SUITES_CACHE"
DOWNLOAD_SECONDS = 300


class SuitesUnavailableError(RuntimeError):
    """The source distribution can neither be found nor downloaded."""


def cache_folder() -> Path:
    """Where suites are kept: the folder that `FUSION_HF_SUITES_CACHE` names, else `.cache` beside this file."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path(__file__).parent / ".cache")


def fetch_suites(version: str = transformers.__version__) -> Path:
    """
    The folder `tests` of transformers' source distribution, downloaded once.

    Raises:
        SuitesUnavailableError: without a package index (or a copy in the cache).
    """
    # get_tests_dir() of transformers.testing_utils looks for a folder whose name ends with "tests"
    folder = cache_folder() / f"transformers-{version}" / "tests"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / "lock"):  # test processes start together
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                extracted = extract_tests(_download(version, Path(scratch)), Path(scratch) / "tests")
                shutil.move(extracted, folder)
    return folder


def extract_tests(archive: Path, target: Path) -> Path:
    """Write the Python files of `<any root>/tests/` in a tar archive to `target`; nothing else, and nowhere else."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            inside = path.parts[1:2] == ("tests",) and ".." not in path.parts and not path.is_absolute()
            if not (inside and member.isfile() and path.suffix == ".py"):
                continue
            source = tar.extractfile(member)
            if source is None:
                continue
            file = target.joinpath(*path.parts[2:])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source.read())
    if not target.is_dir():
        raise SuitesUnavailableError(f"{archive.name} has no folder tests.")
    (target / "__init__.py").touch()  # the repository has it, the distribution does not
    return target


def _download(version: str, folder: Path) -> Path:
    requirement = f"transformers=={version}"
    options = ["--no-deps", "--no-binary", "transformers", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SuitesUnavailableError(_advice(requirement, f"no answer in {DOWNLOAD_SECONDS} s")) from error
    archives = list(folder.glob("transformers-*.tar.gz"))
    if run.returncode != 0 or not archives:
        last_line = (run.stderr.strip() or "pip wrote no archive").splitlines()[-1]
        raise SuitesUnavailableError(_advice(requirement, last_line))
    return archives[0]


def _advice(requirement: str, problem: str) -> str:
    folder = cache_folder() / requirement.replace("==", "-")
    return (
        f"These tests are transformers' own suites, from the source distribution of {requirement}, which cannot be "
        f"downloaded ({problem}). Run them with a package index within reach, or put the distribution's folder "
        f"`tests` into {folder}."
    )
