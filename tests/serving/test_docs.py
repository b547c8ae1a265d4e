"""The examples of docs/serving.md work."""

import json
import shlex
import subprocess
import sys
import urllib.request

from tests.docs.markdown import ROOT, fenced_blocks
from tests.helpers.serving import SECONDS, Server

DOCUMENT = "docs/serving.md"
ADDRESS = "http://127.0.0.1:8000"


def bash_lines(command: str) -> list[list[str]]:
    lines = [line for block in fenced_blocks(DOCUMENT, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))[0] == command]


def test_python_example(server: Server):
    (code,) = fenced_blocks(DOCUMENT, "python")
    assert ADDRESS in code
    command = [sys.executable, "-c", code.replace(ADDRESS, server.url)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "red"
    assert second


def test_curl_example(server: Server):
    ((_, url, dash_h, header, dash_d, body),) = bash_lines("curl")
    assert (dash_h, dash_d) == ("-H", "-d")
    headers = dict([header.split(": ")])
    request = urllib.request.Request(url.replace(ADDRESS, server.url), body.encode(), headers)
    with urllib.request.urlopen(request) as reply:
        assert json.load(reply)["choices"][0]["message"]["content"]
