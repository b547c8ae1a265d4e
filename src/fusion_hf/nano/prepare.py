"""Write the records of the three stages of `fusion-nano`: PNG files, and JSON in LLaVA's format for the recipes.

Tested command: `python -m fusion_hf.nano.prepare runs/fusion-nano` (the first step of `make nano`).
"""

import argparse
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from fusion_hf.drawing.drawn_images import CATEGORIES
from fusion_hf.nano.training_records import DrawnMixture, NanoRecord, Stage, evaluation_records, stage_records

DATA = "data"
VALIDATION_SAMPLE = 300  # questions of each category that are asked after each stage
CHUNK = 256  # images that a process draws at a time


# Numbers of images in FUSION's stages. Counting one kind or colour among others takes longest to learn.
MIXTURES: dict[Stage, DrawnMixture] = {
    "1": DrawnMixture(single=3000, count=5000, spatial=8000, text=6000),
    "1.5": DrawnMixture(single=2000, count=8000, spatial=8000, text=4000),
    "2": DrawnMixture(single=1000, count=18000, spatial=7000, text=6000, easy_vqa=0.7),
}


def scaled(mixture: DrawnMixture, share: float) -> DrawnMixture:
    """Return a mixture with a share of each kind of image, for a trial."""
    drawn = {category: round(share * getattr(mixture, category)) for category in CATEGORIES}
    return DrawnMixture(**drawn, easy_vqa=share * mixture.easy_vqa)


def validation_sample(seed: int) -> list[NanoRecord]:
    """Draw `VALIDATION_SAMPLE` questions of each category. Equal seeds give equal questions."""
    records = evaluation_records("validation", seed, drawn=VALIDATION_SAMPLE)
    easy_vqa = [record for record in records if record.category == "easy-vqa"]
    drawn = [record for record in records if record.category != "easy-vqa"]
    return random.Random(0).sample(easy_vqa, VALIDATION_SAMPLE) + drawn


def write_records(folder: Path, name: str, records: Sequence[NanoRecord]) -> Path:
    """
    Write `folder/name.json` and, in `folder/name`, the image of each record once.

    Args:
        folder: Folder of the data.
        name: Name of the file and of the folder of images.
        records: The records.

    Returns:
        Path of the JSON file.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    first = {record.image: record for record in records}
    files = {image: f"{name}/{number}.png" for number, image in enumerate(first)}
    jobs = [(first[image], folder / file) for image, file in files.items()]
    with ProcessPoolExecutor() as pool:
        list(tqdm(pool.map(_draw, jobs, chunksize=CHUNK), total=len(jobs), desc=name, unit="image", disable=None))
    path = folder / f"{name}.json"
    lines = [json.dumps(record.to_llava(files[record.image])) for record in records]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return path


def _draw(job: tuple[NanoRecord, Path]) -> None:
    record, file = job
    record.open_image().save(file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the run, whose subfolder `data` gets the records")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    folder = arguments.output / DATA
    for stage, mixture in MIXTURES.items():
        name = f"stage{stage}"
        records = stage_records(stage, "train", f"{name}/{arguments.seed}", scaled(mixture, arguments.share))
        write_records(folder, name, records)
    held_out = validation_sample(arguments.seed)
    write_records(folder, "validation", held_out[:: max(1, round(1 / arguments.share))])


if __name__ == "__main__":
    main()
