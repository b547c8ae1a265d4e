"""`benchmarks/gpu.py`: parts in a limited time, what is left of those that fail, and all of it with small sizes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_report
import pytest
from gpu import parse_arguments
from gpu_parts import GPU, SMALL, make_parts
from gpu_schedule import FAILED, MEASURED, NO_TIME, STOPPED, ForkedRunner, Outcome, Part, encode, run_parts
from report import TABLES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SECONDS = 900  # for all parts with small sizes, on a machine that does other things as well


def nothing(emit):
    pass


def test_parts_have_limits_and_what_does_not_fit_is_named():
    clock = [0.0]
    given, notes = {}, []

    def run(part, seconds):
        given[part.name] = seconds
        clock[0] += seconds if part.name == "slow" else 1
        return Outcome(MEASURED)

    parts = [
        Part("quick", limit=40, least=5, measure=nothing),
        Part("slow", limit=40, least=5, measure=nothing),
        Part("large", limit=60, least=30, measure=nothing),
        Part("last", limit=60, least=5, measure=nothing),
    ]
    outcomes = run_parts(parts, 60, run, lambda known: notes.append(dict(known)), lambda: clock[0])
    assert given == {"quick": 40, "slow": 40, "last": 19}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "quick": MEASURED,
        "slow": MEASURED,
        "large": NO_TIME,
        "last": MEASURED,
    }
    assert [list(known) for known in notes] == [
        ["quick"],
        ["quick", "slow"],
        ["quick", "slow", "large"],
        list(outcomes),
    ]


def hang(emit):
    emit({"rounds": 1}, "hanging.json")
    emit({"rounds": 2}, "hanging.json")
    emit({"seen": "much"})
    subprocess.Popen(["sleep", "60"])
    time.sleep(60)


def fail(emit):
    emit({"rounds": 1}, "failing.json")
    raise RuntimeError("out of\nluck")


def die(emit):
    os._exit(9)


def tell_nonsense(emit):
    emit({"a set": {1}}, "nonsense.json")


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of Python 3.12, where a process with threads forks
def test_what_a_part_has_told_stays(tmp_path):
    run = ForkedRunner(tmp_path / "results")
    parts = {
        function.__name__: Part(function.__name__, 1, 0, function) for function in (hang, fail, die, tell_nonsense)
    }
    outcomes = {name: run(part, 1.5 if name == "hang" else 60) for name, part in parts.items()}
    assert [outcome.status for outcome in outcomes.values()] == [STOPPED, FAILED, FAILED, FAILED]
    assert outcomes["hang"].seconds >= 1
    assert outcomes["hang"].result == {"seen": "much"}
    assert outcomes["fail"].error == "RuntimeError: out of\nluck"
    assert "status 9" in outcomes["die"].error
    assert outcomes["tell_nonsense"].error.startswith("TypeError")
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert written == {"hanging.json": {"rounds": 2}, "failing.json": {"rounds": 1}}
    good = run(Part("good", 60, 0, lambda emit: emit({"pid": os.getpid()})), 60)
    assert good.status == MEASURED and good.error == "" and good.result["pid"] != os.getpid()


def test_files_are_those_that_the_tables_read():
    known = {file for table in TABLES for file in table.columns.values()}
    assert set(GPU.files.values()) <= known
    assert not set(SMALL.files.values()) & known
    assert [part.name for part in make_parts(GPU)] == [part.name for part in make_parts(SMALL)]
    assert all(0 < part.least < part.limit for part in make_parts(GPU))


@pytest.mark.parametrize("flags", [["--device", "cpu"], ["--small"], ["--small", "--device", "cpu", "--parts", "all"]])
def test_flags_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(flags)
    assert ended.value.code == 2


def test_the_table_says_what_became_of_each_part(tmp_path):
    document = f"{gpu_report.TABLE.begin}\n{gpu_report.TABLE.end}"
    assert "not measured" in gpu_report.update(document, tmp_path)
    parts = {
        "machine": {"status": MEASURED, "seconds": 0.1, "error": "", "result": {
            "machine": {"device": "A GPU"}, "versions": {"torch": "3.0", "transformers": "6.0"}}},
        "checks": {"status": FAILED, "seconds": 9.5, "error": "RuntimeError: a|b\nmore", "result": {
            "tests": {"passed": 3, "failed": 1}, "failed": {"tests/a.py::test_b": "assert 0"}}},
        "inference_3b": {"status": STOPPED, "seconds": 90.0, "error": "", "result": None},
    }  # fmt: skip
    (tmp_path / "gpu.json").write_bytes(encode({"seconds": 360, "parts": parts}))
    text = gpu_report.update(document, tmp_path)
    assert r"| checks | failed | 9.5 | 3 passed; 1 failed; failed: `tests/a.py::test_b`; RuntimeError: a\|b |" in text
    assert "| inference_3b | stopped: no time | 90.0 |  |" in text
    assert "A GPU, torch 3.0, transformers 6.0." in text


@pytest.mark.slow
def test_every_part_with_small_sizes(tmp_path, working_peers):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--seconds", str(SECONDS)]
    process = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    parts = json.loads((tmp_path / "small_gpu.json").read_text())["parts"]
    assert {part["status"] for part in parts.values()} == {MEASURED}
    assert parts["inference_3b"]["result"]["errors"] == {}
    for equal in parts["inference_3b"]["result"]["equal_tokens"].values():
        assert equal["equal"] == equal["of"] > 0
    assert parts["checks"]["result"]["tests"].keys() == {"passed"}
    files = {
        name: json.loads((tmp_path / file).read_text()) for name, file in SMALL.files.items() if name != "quantization"
    }
    assert {"ours", "ours_ahead", "ours_prompt_compiled"} <= files["inference_3b"]["medians"][
        "per_token_seconds"
    ].keys()
    assert files["training_8b"]["step"]["machine_fractions"].keys() >= {"ours", "ours_checkpointed"}
