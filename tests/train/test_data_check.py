"""`fusion-hf data check`: as a real process, and its reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.training_data import NUM_RECORDS, make_record, png, write_format, write_json, write_pictures

from fusion_hf.cli import main

SECONDS = 300


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A mixture of a good file, a file with problems of several kinds and one that is missing."""
    records = write_pictures(tmp_path)
    write_json(tmp_path / "good.json", records)
    bad = [make_record(number) for number in range(NUM_RECORDS)]
    bad[0]["conversations"] = bad[1]["conversations"] = []
    bad[2]["image"] = "pictures/none.png"
    bad[4]["image"] = "../escape.png"
    bad[5]["image"] = "cut.png"
    (tmp_path / "cut.png").write_bytes(png(5)[:50])
    write_json(tmp_path / "bad.json", bad)
    entries = "{json_path: good.json}, {json_path: bad.json, sampling_strategy: 'end:50%'}, {json_path: none.json}"
    (tmp_path / "mixture.yaml").write_text(f"datasets: [{entries}]", encoding="utf-8")
    return tmp_path


def check(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> tuple[int, str, str]:
    status = main(["data", "check", *map(str, arguments), "--data-cache", str(folder / "cache")])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_as_a_process(data: Path):
    arguments = [sys.executable, "-m", "fusion_hf", "data", "check", "mixture.yaml", "--images", "decode"]
    ran = subprocess.run(
        arguments,
        env={**os.environ, "HF_HOME": str(data / "home")},
        cwd=data,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    assert ran.returncode == 1 and ran.stderr == ""
    lines = ran.stdout.splitlines()
    assert lines[0].split() == ["file", "taken", "records", "size", "no", "image", "broken"]
    sizes = [f"{(data / name).stat().st_size / 1000:.1f}" for name in ("good.json", "bad.json")]
    assert lines[1].split() == ["good.json", "7", "7", sizes[0], "kB", "1", "0"]
    assert lines[2].split() == ["bad.json", "4", "7", sizes[1], "kB", "1", "5"]
    assert lines[3].split() == ["none.json", *"----", "cannot", "be", "read"]
    assert lines[4].startswith("total: 2 of 3 present  ") and lines[4].split()[5:7] == ["11", "14"]
    text = "\n".join(lines[5:])
    assert "empty conversation: 2, first " in text and "bad.json, record 0 (id 'id0')" in text
    assert (
        "missing image: 1, first " in text and "path escape: 1, first " in text and "broken image: 1, first " in text
    )
    assert "none.json does not exist" in text
    assert len(lines) == 10
    assert len(list((data / "home" / "fusion_hf" / "data").glob("*.arrow"))) == 2


@pytest.mark.parametrize(("images", "broken"), [("none", 2), ("exist", 4), ("decode", 5)])
def test_reports_as_json(data: Path, capsys: pytest.CaptureFixture[str], images: str, broken: int):
    status, out, err = check(capsys, data, data / "mixture.yaml", "--images", images, "--json")
    assert (status, err) == (1, "")
    report = json.loads(out)
    good, bad, missing = report["entries"]
    assert not report["fine"] and (report["records"], report["taken"]) == (14, 11)
    assert good["error"] is None and good["problems"] == {"counts": {}, "first": {}}
    assert good["size"] == (data / "good.json").stat().st_size and good["without_image"] == 1
    assert sum(bad["problems"]["counts"].values()) == broken
    assert set(bad["problems"]["first"]) == set(bad["problems"]["counts"])
    assert "mixture.yaml, entry 3: " in missing["error"]


@pytest.mark.parametrize("kind", ["json", "tar", "parquet_bytes", "folder"])
def test_all_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    status, out, err = check(capsys, tmp_path, write_format(tmp_path / "data", kind), "--images", "decode")
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split()[1:3] == ["7", "7"] and len(out.splitlines()) == 3


def test_pictures_under_another_root(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "lists").mkdir()
    moved = (data / "good.json").rename(tmp_path / "lists" / "good.json")
    assert check(capsys, data, moved)[0] == 1
    assert check(capsys, data, moved, "--data-root", data)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml cannot be read"),
        (["none.json"], "none.json does not exist"),
        (["good.json", "--data-root", "none"], "data_root: none is no folder"),
        (["good.json", "--images", "some"], "invalid choice: 'some'"),
        ([], "the following arguments are required: MIXTURE_OR_FILE"),
    ],
)
def test_wrong_command_lines(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(data)
    try:
        status = main(["data", "check", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and message in printed.err


def test_names_do_not_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = {"id": "\x1b[2J", "conversations": []}
    status, out, _ = check(capsys, tmp_path, write_json(tmp_path / "a.json", [record]))
    assert status == 1 and "\x1b" not in out and "empty conversation: 1" in out
