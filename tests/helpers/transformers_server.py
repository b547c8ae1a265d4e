"""`transformers serve`, for comparison, and as a server with a real model."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.http_server import HERE, free_port
from tests.helpers.waiting import wait_until

START_SECONDS, PAUSE = 300, 0.5


@contextmanager
def serve_transformers(*arguments: str, log: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address, once it answers or has ended."""
    port = free_port()
    url = f"http://{HERE}:{port}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *arguments]
    command += ["--host", HERE, "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(log.parent / "modules"), **variables}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            wait_until(lambda: process.poll() is not None or is_healthy(url), START_SECONDS, log.read_text, PAUSE)
            yield process, url
        finally:
            process.kill()


def is_healthy(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
    except OSError:  # nobody listens yet; URLError is one
        return False
    return True
