"""`fusion-hf data check`: as a real process, and its reports."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from tests.helpers.serving import ImageHost
from tests.helpers.training_data import NUM_RECORDS, make_record, png, write_format, write_images, write_json

from fusion_hf.cli import main
from fusion_hf.data import check as check_module

SECONDS = 300


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A mixture of a good file, a file with problems of several kinds and one that is missing."""
    records = write_images(tmp_path)
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


def test_images_under_another_root(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "lists").mkdir()
    moved = (data / "good.json").rename(tmp_path / "lists" / "good.json")
    assert check(capsys, data, moved)[0] == 1
    assert check(capsys, data, moved, "--data-root", data)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml cannot be read"),
        (["none.json"], "none.json does not exist"),
        (["good.json", "--data-root", "none"], "`data_root` must be the folder that holds the images, got none"),
        (["good.json", "--images", "some"], "invalid choice: 'some'"),
        (["good.json", "--on-truncated", "skip"], "invalid choice: 'skip'"),
        (["good.json", "--max-image-pixels", "0"], "a whole number from 1"),
        (["good.json", "--image-root", "none"], "`image_roots` must contain folders, got none"),
        (["good.json", "--allow-image-host", "a/b"], "NAME:PORT or an IP address, got 'a/b'"),
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


def test_a_sample_is_decoded_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    """And it is the same each time; whether images are there is looked up for all."""
    records = write_images(tmp_path)
    monkeypatch.setattr(check_module, "SAMPLE", 2)
    for number in range(NUM_RECORDS):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number)[:50])
    file = write_json(tmp_path / "a.json", records)
    status, out, _ = check(capsys, tmp_path, file)
    assert status == 1 and "broken image: 2, first " in out
    assert out.splitlines()[-1] == "decoded: 2 of 6 images; --images decode opens all"
    assert check(capsys, tmp_path, file)[1] == out
    (tmp_path / "pictures" / "6.png").unlink()
    report = json.loads(check(capsys, tmp_path, file, "--json")[1])["entries"][0]
    assert (report["decoded"], report["with_image"]) == (2, 6)
    assert report["problems"]["counts"]["missing image"] == 1


def test_a_sample_of_few_images_is_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, out, _ = check(capsys, tmp_path, write_format(tmp_path / "data", "json"))
    assert status == 0 and out.splitlines()[-1] == "decoded: 6 of 6 images"


def test_images_are_judged_by_the_keys_of_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records = write_images(tmp_path)
    stream = BytesIO()
    Image.effect_noise((96, 64), 50).save(stream, "JPEG")
    (tmp_path / "pictures" / "1.png").write_bytes(stream.getvalue()[:-500])
    file = write_json(tmp_path / "a.json", records)
    assert check(capsys, tmp_path, file)[0] == 1
    assert check(capsys, tmp_path, file, "--on-truncated", "load")[0] == 0
    status, out, _ = check(capsys, tmp_path, file, "--on-truncated", "load", "--max-image-pixels", 6143)
    assert status == 1 and "96 x 64 = 6144 pixels, more than max_image_pixels = 6143" in out


def test_images_of_further_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "data").mkdir()
    records = write_images(tmp_path / "elsewhere")
    for record in records:
        if "image" in record:
            record["image"] = str(tmp_path / "elsewhere" / record["image"])
    with ImageHost() as host:
        records[0]["image"] = f"{host.url}/red.png"
        file = write_json(tmp_path / "data" / "a.json", records)
        status, out, _ = check(capsys, tmp_path, file)
        assert status == 1 and "path escape: 5, first" in out and "remote image: 1, first" in out
        allowed = ["--image-root", tmp_path / "elsewhere", "--allow-private-image-host", f"127.0.0.1:{host.port}"]
        assert check(capsys, tmp_path, file, *allowed, "--images", "exist")[0] == 0 and host.requested == []
        assert check(capsys, tmp_path, file, *allowed)[0] == 0 and host.requested == ["/red.png"]
