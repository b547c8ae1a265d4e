"""A task that `fusion-nano` was never trained on, for docs/lora.md: which of two shapes is smaller?

`python -m fusion_hf.nano.sizes FOLDER` draws the images and writes `train.json` and `test.json` in LLaVA's format.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fusion_hf.data.record_parsing import llava_record
from fusion_hf.drawing.drawn_images import DrawnImage, DrawnShape, Split, draw_spec

QUESTION = "what color is the smaller shape?"
COUNTS: dict[Split, int] = {"train": 2000, "test": 200}
CLEARLY = 1.5  # minimum ratio of the areas of the two shapes
AREA_OF_BOX = {"rectangle": 1.0, "circle": 0.785, "triangle": 0.5}  # share of its box that a shape covers


def area(shape: DrawnShape) -> float:
    """Return the area of a shape in canvas pixels."""
    return AREA_OF_BOX[shape.kind] * shape.width * shape.height


def smaller(spec: DrawnImage) -> DrawnShape | None:
    """Return the smaller one of two shapes, or None if their areas are too similar."""
    small, large = sorted(spec.shapes, key=area)
    return small if area(large) >= CLEARLY * area(small) else None


def write_split(folder: Path, split: Split, count: int) -> Path:
    """
    Draw images into `folder/split`, and write `folder/split.json` with a record for each.

    Args:
        folder: Folder of the data.
        split: Name of the split.
        count: Number of images.

    Returns:
        Path of the JSON file.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    index = 0
    with tqdm(total=count, desc=split, unit="image", disable=None) as bar:
        while len(records) < count:
            spec = draw_spec("spatial", split, index, seed="sizes")
            index += 1
            if (shape := smaller(spec)) is None:
                continue
            name = f"{split}/{len(records)}.png"
            spec.render().save(folder / name)
            records.append(llava_record(name, name, [(QUESTION, shape.color)]))
            bar.update()
    random.Random(split).shuffle(records)
    path = folder / f"{split}.json"
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw images of two shapes, and ask which of them is smaller.")
    parser.add_argument("folder", type=Path, help="folder for the images and records")
    folder = parser.parse_args().folder
    for split, count in COUNTS.items():
        write_split(folder, split, count)


if __name__ == "__main__":
    main()
