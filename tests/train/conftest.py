"""Records with drawn images, and recipes that start from the bundled fusion-nano."""

import json
import random
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

from fusion_hf import nano_path

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def make_records(folder: Path, count: int = 24, text_every: int = 4) -> list[dict]:
    """Questions about the colour of a circle, of one or two turns; every `text_every`-th has no image."""
    rng = random.Random(0)
    (folder / "pictures").mkdir(parents=True)
    records = []
    for number in range(count):
        color = rng.choice(list(COLORS))
        turns = [{"from": "human", "value": "what color is the shape?"}, {"from": "gpt", "value": color}]
        if number % 3 == 0:
            turns += [{"from": "human", "value": "is it a circle?"}, {"from": "gpt", "value": "yes"}]
        record = {"id": str(number), "conversations": turns}
        if text_every == 0 or number % text_every:
            image = Image.new("RGB", (64, 64), (240, 240, 240))
            ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=COLORS[color])
            image.save(folder / "pictures" / f"{number}.png")
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = f"pictures/{number}.png"
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records))
    return records


@pytest.fixture
def records(tmp_path) -> list[dict]:
    """The records of `recipe`, with their images' full paths."""
    made = make_records(tmp_path / "data")
    return [
        {**record, "image": str(tmp_path / "data" / record["image"])} if "image" in record else record
        for record in made
    ]


@pytest.fixture
def recipe(tmp_path, records) -> Path:
    values = {
        "model": nano_path(),
        "data": "data/records.json",
        "data_cache": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "run"),
        "global_batch_size": 4,
        "learning_rate": 1e-4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "query_lens": [4, 16],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
