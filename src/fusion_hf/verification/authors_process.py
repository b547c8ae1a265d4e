"""Running `authors_worker.py` with the Python of the authors' environment and a time limit.

Code of another repository is executed here, with the rights of the user. This happens only with a folder that the user
names for this purpose. This module imports nothing large.
"""

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.common.outputs import json_bytes

WORKER = Path(__file__).with_name("authors_worker.py")
REPORT, JOB, LOG = "report.json", "job.json", "worker.log"
# files that the worker imports
NEEDED = ("fusion/model/__init__.py", "fusion/constants.py", "fusion/conversation.py", "fusion/mm_utils.py")
IMPORTS = "import torch, transformers, safetensors, PIL"
IMPORT_SECONDS = 300  # enough for a cold disk
NOT_GIVEN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
NO_SPACE = "No space left on device"
LOG_TAIL = 20_000  # bytes at the end of the log that are read
LINES, LONGEST_REASON = 2, 300  # lines of the log in an error (the failure and the line before it), and characters


@dataclass(frozen=True)
class AuthorsEnvironment:
    """A checkout of the authors' repository, and the Python with the packages that it needs."""

    code: Path
    python: str


def find_environment(code: Path, python: str) -> AuthorsEnvironment:
    """
    Check that there is a repository and a Python. Nothing is executed.

    Args:
        code: Folder of the checkout.
        python: Path or name of the Python executable.

    Returns:
        The environment.

    Raises:
        InputError: If either is missing.
    """
    for name in NEEDED:
        if not (code / name).is_file():
            raise InputError(
                f"--authors-code must be a checkout of the authors' repository, got {short_name(str(code))}, which "
                f"has no {name}."
            )
    found = shutil.which(Path(python).expanduser())
    if found is None:
        raise InputError(
            "--authors-python must be the Python of an environment with the authors' requirements, got "
            f"{short_name(python)!r}, which is not a program."
        )
    # not resolved, because the link in an environment identifies the environment
    return AuthorsEnvironment(code.resolve(), str(Path(found).absolute()))


def check_packages(environment: AuthorsEnvironment) -> None:
    """
    Check that the Python has the packages that the worker needs.

    Args:
        environment: The authors' environment.

    Raises:
        InputError: If an import fails, or takes too long.
    """
    command = [environment.python, "-c", IMPORTS]
    try:
        done = subprocess.run(
            command, env=process_variables(), stdin=subprocess.DEVNULL, capture_output=True, timeout=IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"--authors-python: `{IMPORTS}` took more than {IMPORT_SECONDS} s.") from error
    except OSError as error:
        raise InputError(f"--authors-python: {environment.python} cannot be run: {error.strerror}.") from error
    if done.returncode != 0:
        reason = _last_lines(done.stderr)
        raise InputError(f"--authors-python: `{IMPORTS}` failed in {environment.python}: {reason}.")


def run_worker(environment: AuthorsEnvironment, job: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """
    Run a job in the worker and wait for it.

    Args:
        environment: The authors' environment.
        job: Job for the worker, see `authors_worker.main`. `code` and `folder` are added.
        folder: Empty folder for the job and its results.
        seconds: Time limit in seconds.

    Returns:
        The report of the worker.

    Raises:
        InputError: If the worker fails or exceeds the limit. The message contains the last lines of its log.
    """
    (folder / JOB).write_bytes(json_bytes({**job, "code": str(environment.code), "folder": str(folder)}))
    command = [environment.python, str(WORKER), str(folder / JOB)]
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=process_variables(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"The authors' code exceeded {seconds:g} s (--timeout). The last lines of its log: {_log_end(folder)}."
            ) from error
        finally:
            _end(process)
    if status != 0:
        raise InputError(_failure(status, folder))
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def process_variables() -> dict[str, str]:
    """Return environment variables for the worker, without secrets, paths of this package, or network access."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_GIVEN}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**kept, **offline, "PYTHONDONTWRITEBYTECODE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all processes that it started."""
    if process.poll() is None:
        if os.name == "posix":
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _failure(status: int, folder: Path) -> str:
    line = _log_end(folder)
    if NO_SPACE in line:
        return f"{folder} has no space left for the results of the authors' code. Set TMPDIR to a larger disk."
    if status < 0:
        cause = " (often because memory is exhausted)" if -status == signal.SIGKILL else ""
        return f"The authors' code was ended by signal {-status}{cause}. The last lines of its log: {line}."
    return f"The authors' code ended with status {status}: {line}."


def _log_end(folder: Path) -> str:
    with (folder / LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL))
        return _last_lines(log.read())


def _last_lines(text: bytes) -> str:
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return " | ".join(lines[-LINES:])[-LONGEST_REASON:].rstrip(".") if lines else "nothing was written"
