"""Names of the Hub where it cannot be reached: one line, at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.helpers.light_runs import light_environment, run_light

CLOSED_PORT = "http://127.0.0.1:9"
SECONDS = 20  # of a clock, where the Hub's client would try for 50 and more; most of them are a busy machine's
BUILD = Path(__file__).parents[2] / "conversion" / "build_from_backbones.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text("model: some/model\ndata: records.json\noutput_dir: out\n")
    (tmp_path / "records.json").write_text("[]")
    return tmp_path


def variables(folder: Path) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": CLOSED_PORT, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_test"}


def test_names_of_the_hub(folder: Path):
    lines = {
        "convert --model some/model --output new": "--model: 'some/model'",
        "convert --model some/model --dry-run": "--model: 'some/model'",
        "convert --model some/model --output new --repo-id me/it": "me/it",
        "build --text some/text --vision some/tower --output new": "--text: 'some/text'",
        "ask records.json what? --model some/model": "some/model",
        "export --output new --model some/model": "some/model",
        "evaluate --tasks pope --model some/model": "some/model",
        "train run.yaml": "some/model",
    }
    begin = time.perf_counter()
    results = run_light(folder, [line.split() for line in lines], **variables(folder))
    assert time.perf_counter() - begin < SECONDS
    for (line, part), result in zip(lines.items(), results, strict=True):
        assert (result.status, result.out, result.error.count("\n")) == (2, "", 1), (line, result)
        assert part in result.error and ("cannot be reached" in result.error or "cannot be asked" in result.error)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "fusion_hf", "convert", "--model", "some/model", "--output", "new"],
        [str(BUILD), "--text", "some/model", "--vision", "some/tower", "--output", "new"],
    ],
)
def test_a_process_of_its_own(folder: Path, command: list[str]):
    """In which the Hub's client would write its tries as well, and the root logger once more."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=light_environment(folder, **variables(folder)),
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "'some/model' is not a local path, and the Hub cannot be reached" in done.stderr


def test_data_of_the_hub(folder: Path):
    """`datasets` tries for half a minute as well; what it has in its cache it still gives."""
    code = "from fusion_hf.data import table_sources; table_sources.load_hub('some/data', 'train')"
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables(folder)},
        capture_output=True,
        encoding="utf-8",
        timeout=3 * SECONDS,
    )
    assert time.perf_counter() - begin < SECONDS
    assert "InputError: data: some/data:train cannot be loaded" in done.stderr
    assert "Retry" not in done.stderr
