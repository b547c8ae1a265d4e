"""A new user's way: a folder of own images and a file about them, checked and trained on, as real processes."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image, ImageDraw
from tests.helpers.training_data import add_member, write_json, write_jsonl

from fusion_hf import nano_path

COUNT, STEPS, BATCH = 40, 2, 4
SECONDS = 600  # a hung process fails its test
COLORS = ("red", "green", "blue", "black", "orange")
QUESTION = "what color is the shape?"


def draw(folder: Path) -> list[Path]:
    """Forty images, as a camera and a scanner write them."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(COUNT):
        image = Image.new("RGB", (120 + number, 90), "white")
        ImageDraw.Draw(image).ellipse((20, 20, 70, 70), fill=COLORS[number % len(COLORS)])
        path = folder / f"IMG {number:04d}.{'JPG' if number % 2 else 'png'}"
        image.save(path, "JPEG" if number % 2 else "PNG")
        paths.append(path)
    return paths


def answer(number: int) -> str:
    return COLORS[number % len(COLORS)]


def as_llava(root: Path, images: list[Path]) -> Path:
    records = [
        {
            "id": path.stem,
            "image": f"photos/{path.name}",
            "conversations": [
                {"from": "user", "value": f"<image>\n{QUESTION}"},
                {"from": "assistant", "value": answer(number)},
            ],
        }
        for number, path in enumerate(images)
    ]
    return write_json(root / "data.json", records)


def as_openai(root: Path, images: list[Path]) -> Path:
    records: list[dict[str, Any]] = []
    for number, path in enumerate(images):
        content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": str(path)}}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer(number)}]
        records.append({"messages": turns})
    (root / "lists").mkdir()
    return write_jsonl(root / "lists" / "data.jsonl", records)


def as_finevision(root: Path, images: list[Path]) -> Path:
    rows = [
        {"images": [Image.open(path)], "texts": [{"user": QUESTION, "assistant": answer(number)}]}
        for number, path in enumerate(images)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(root / "saved"))
    return root / "saved"


def as_webdataset(root: Path, images: list[Path]) -> Path:
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "000.tar", "w") as tar:
        for number, path in enumerate(images):
            name = f"{number:06d}"
            add_member(tar, f"{name}{path.suffix.lower()}", path.read_bytes())
            add_member(tar, f"{name}.txt", f"a {answer(number)} shape".encode())
    return root / "shards"


LAYOUTS: dict[str, Callable[[Path, list[Path]], Path]] = {
    "llava": as_llava,
    "openai": as_openai,
    "finevision": as_finevision,
    "webdataset": as_webdataset,
}


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fusion_hf", *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
    )


def write_recipe(folder: Path, data: Path, **keys: Any) -> Path:
    values = {
        "model": nano_path(),
        "data": str(data),
        "output_dir": "run",
        "global_batch_size": BATCH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "query_lens": [4],
        "learning_rate": 1e-4,
        "train": ["projectors"],
        "disable_tqdm": True,
        **keys,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS])
def test_own_images_are_checked_and_trained_on(tmp_path: Path, layout: str):
    data = LAYOUTS[layout](tmp_path, draw(tmp_path / "photos"))
    # absolute paths beside the file's folder need a root by name
    options, keys = ([], {}) if layout != "openai" else (["--image-root", "photos"], {"image_roots": ["photos"]})
    checked = run(tmp_path, "data", "check", data, *options)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.splitlines()[1].split()[-6:-5] == [str(COUNT)]
    assert f"decoded: {COUNT} of {COUNT} images" in checked.stdout

    trained = run(tmp_path, "train", write_recipe(tmp_path, data, **keys))
    assert trained.returncode == 0, trained.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "language_loss" in step] == [1, 2]
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_what_is_wrong_is_told_before_the_training(tmp_path: Path):
    images = draw(tmp_path / "photos")
    records = json.loads(as_llava(tmp_path, images).read_text())
    for record in records:
        record["image_path"] = record.pop("image")
    data = write_json(tmp_path / "data.json", records)
    checked = run(tmp_path, "data", "check", data)
    assert checked.returncode == 1 and "rename 'image_path' to 'image'" in checked.stdout
    trained = run(tmp_path, "train", write_recipe(tmp_path, data))
    assert trained.returncode == 2 and "rename 'image_path' to 'image'" in trained.stderr
