"""`fusion-hf serve` itself: wrong arguments, a missing extra, its end."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.helpers.serving import STOP_SECONDS, ask, start_server, user

from fusion_hf.cli import main
from fusion_hf.cli.terminal import USER_ERROR

PARALLEL = 16
WITHOUT_EXTRA = """
import sys
sys.modules["starlette"] = sys.modules["starlette.applications"] = None
from fusion_hf.cli import main
sys.exit(main(["serve"]))
"""


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--port", "70000"], "0 to 65535"),
        (["--port", "x"], "whole number"),
        (["--concurrency", "0"], "whole number from 1"),
        (["--queue-length", "-1"], "whole number"),
        (["--max-image-bytes", "1e6"], "whole number"),
    ],
)
def test_wrong_numbers(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == USER_ERROR
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--api-key-env", "FUSION_NO_KEY"], "variable FUSION_NO_KEY (--api-key-env) is not set"),
        (["--api-key-env", "FUSION_ODD_KEY"], "printable ASCII"),
        (["--allow-image-host", "http://a"], "or an IP address, got 'http://a'"),
        (["--allow-private-image-host", "*"], "got '*'"),
        (["--engine", "vllm", "--device", "cpu"], "`--device` is not allowed with `--engine vllm`"),
        (["--engine", "vllm", "--max-seconds", "9"], "`--max-seconds` is not allowed with `--engine vllm`"),
        (["--engine", "vllm"], "pip install 'fusion_hf[serve,vllm]'"),  # which no test environment but its own has
        (["--", "--max-model-len", "9"], "only allowed with `--engine vllm`, got '--max-model-len 9'"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1 port 8000"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FUSION_ODD_KEY", "schl\u00fcssel")
    assert main(["serve", *arguments]) == USER_ERROR
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def test_taken_port(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == USER_ERROR
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_missing_extra():
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, encoding="utf-8")
    assert result.returncode == USER_ERROR
    assert "pip install 'fusion_hf[serve]'" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_signals_end_answers(endless_model: Path, tmp_path: Path, number: signal.Signals, status: int):
    """A server that is told to end does not wait for long answers, and has no traceback for it. It speaks IPv6."""
    with start_server(
        "--model", endless_model, "--host", "::1", "--concurrency", PARALLEL, errors=tmp_path / "errors"
    ) as (process, server):
        assert server.url.startswith("http://[::1]:")
        client = server.client()
        with ThreadPoolExecutor(PARALLEL) as pool:
            pending = [pool.submit(ask, client, user("tell me"), max_tokens=900) for _ in range(PARALLEL)]
            server.wait_for(running=PARALLEL)  # together they would take longer than the server waits
            os.kill(server.pid, number)
            assert process.wait(STOP_SECONDS) == status
            for answer in pending:
                reply = answer.result()
                assert reply.choices[0].finish_reason == "length"
                assert 0 < reply.usage.completion_tokens < 900
        assert server.errors.read_text(encoding="utf-8") == ""
