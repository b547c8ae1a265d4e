"""`fusion-hf synthesize`: what it says, before, during and after a run."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.helpers.openai_server import Scripted
from tests.synthesis.runs import all_bytes

from fusion_hf.cli import main
from fusion_hf.cli.synthesize import progress_line
from fusion_hf.synthesis.progress import KEPT, REJECTED

KEY, VARIABLE = "sk-very-secret-key", "TEST_SYNTHESIS_KEY"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["synthesize", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_run_and_its_status(server: Scripted, make_config, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = make_config(server, records=4, executor__tasks=1, categories={"SynthColor": 1})
    status, out, _ = command(capsys, config, "--status")
    assert status == 0 and "not finished" in out
    status, out, errors = command(capsys, config)
    assert status == 0 and "SynthColor" in out and str(tmp_path / "run" / "data") in out
    assert "requests: 8, about" in errors and "cost: unknown" in errors
    assert command(capsys, config, "--status")[1] == out
    assert command(capsys, tmp_path / "run", "--status")[1] == out


def test_the_estimate_needs_no_endpoint_and_writes_nothing(server: Scripted, make_config, capsys, tmp_path: Path):
    prices = {"writer__price_per_million_input": 1, "writer__price_per_million_output": 2}
    rates = {"writer__tokens_per_second": 1000, "images__seconds_per_picture": 2, "images__price_per_picture": 0.01}
    config = make_config(
        server, records=1000, categories={"SynthCount": 1, "SynthContrastShort": 1}, **prices, **rates
    )
    status, out, _ = command(capsys, config, "--dry-run")
    assert status == 0 and not server.requests and not (tmp_path / "run").exists()
    assert "records: 1,000 (SynthContrastShort 500, SynthCount 500)" in out
    assert "requests: 2,000" in out and "images: 1,500" in out
    cost = float(out.split("cost: about ")[1].split(";")[0])
    hours = float(out.split("time: about ")[1].split(" ")[0])
    assert 15 < cost < 20 and 0.8 < hours < 1.1  # 1500 images: 15 and 0.83 hours


def test_wrong_input_is_one_line(server: Scripted, make_config, capsys: pytest.CaptureFixture[str]):
    config = make_config(server)
    status, _, errors = command(capsys, config, "recods=1")
    assert (
        status == 2 and errors.startswith("error: ") and "Did you mean 'records'" in errors and errors.count("\n") == 1
    )
    status, _, errors = command(capsys, config, "writer.key_variable=NO_SUCH_VARIABLE")
    assert status == 2 and "NO_SUCH_VARIABLE" in errors


def test_a_failed_task_is_one_line(server: Scripted, make_config, capsys: pytest.CaptureFixture[str]):
    server.faults = lambda payload, repeat: "404"
    status, _, errors = command(capsys, make_config(server, records=2))
    assert status == 1
    assert errors.splitlines()[-1].startswith("error: ") and "HTTP 404 Not Found" in errors
    assert "run the same command" in errors and "Traceback" not in errors


def test_no_key_is_in_any_file(server: Scripted, make_config, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.key = KEY
    monkeypatch.setenv(VARIABLE, KEY)
    options = {"writer__key_variable": VARIABLE, "executor__tasks": 1, "records": 2}
    assert command(capsys, make_config(server, "good", **options))[0] == 0
    server.key = "another"
    status, out, errors = command(capsys, make_config(server, "refused", **options))
    assert status == 1 and KEY not in out + errors
    server.key, server.faults = KEY, lambda payload, repeat: "drop"
    status, out, errors = command(capsys, make_config(server, "dropped", writer__patience=1, **options))
    assert status == 1 and KEY not in out + errors
    assert [name for name, content in all_bytes(tmp_path).items() if KEY.encode() in content] == []


def test_without_the_extra_the_error_names_it(tmp_path: Path):
    code = (
        "import sys; sys.modules['datatrove'] = None\n"
        "from fusion_hf.cli import main; sys.exit(main(['synthesize', 'x.yaml']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert result.returncode == 2 and "pip install 'fusion_hf[synth]'" in result.stderr


def test_a_line_of_progress():
    counts = Counter({("SynthColor", KEPT): 1200, ("SynthColor", REJECTED): 3, ("SynthText", KEPT): 2})
    assert progress_line("1-describe", counts) == "1-describe: 1,205 (SynthColor 1,200 -3, SynthText 2)"
