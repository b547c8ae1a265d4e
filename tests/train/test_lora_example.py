"""The commands of docs/lora.md, "LoRA in five minutes", do what the text says."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusion_hf.nano.sizes import CLEARLY, QUESTION, area, smaller, write_split

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## LoRA in five minutes\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MINUTES, AT_FIRST, AT_LAST = 5, 0.6, 0.9


def test_records_of_the_task(tmp_path: Path) -> None:
    records = json.loads(write_split(tmp_path, "train", 20).read_text())
    assert len(records) == 20 and len({record["id"] for record in records}) == 20
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question == f"<image>\n{QUESTION}" and answer
        assert (tmp_path / record["image"]).is_file()


def test_smaller_is_clearly_smaller() -> None:
    from fusion_hf.drawing.drawn_images import draw_spec

    specs = [draw_spec("spatial", "test", index) for index in range(50)]
    clear = [spec for spec in specs if smaller(spec) is not None]
    assert 10 < len(clear) < 50
    for spec in clear:
        areas = sorted(area(shape) for shape in spec.shapes)
        assert areas[1] >= CLEARLY * areas[0] and area(smaller(spec)) == areas[0]


@pytest.mark.slow
def test_lora_in_five_minutes(tmp_path: Path) -> None:
    section = SECTION.search((ROOT / "docs" / "lora.md").read_text())
    assert section is not None, "docs/lora.md has no section 'LoRA in five minutes'"
    commands = [line for block in BLOCK.findall(section[1]) for line in block.splitlines()]
    assert len(commands) == 4
    for name in ("configs", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begin = time.monotonic()
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if " train " in f" {command} ":
            assert time.monotonic() - begin < 60 * MINUTES
    lines = [json.loads(line) for line in (tmp_path / "runs/lora-sizes/log.jsonl").read_text().splitlines()]
    accuracies = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    assert accuracies[0] <= AT_FIRST and accuracies[-1] >= AT_LAST
    records = json.loads((tmp_path / "runs/sizes/test.json").read_text())
    expected = next(record for record in records if record["image"] == "test/0.png")["conversations"][1]["value"]
    assert done.stdout.strip() == expected
