"""Questions of mixed lengths, with and without drawn images, for batches."""

import json
import random
from pathlib import Path
from typing import Any

from fusion_hf.drawing.drawn_images import CATEGORIES, draw_spec

QUESTIONS = (
    "what color is the shape?",
    "how many shapes are there?",
    "is there a blue shape?",
    "what shape is in the image, and where is it, and does it stand alone?",
    "what word is written?",
)


def write_questions(folder: Path, count: int, images: int = 12, seed: int = 0) -> tuple[Path, list[dict[str, Any]]]:
    """A JSONL file and its records; two of three have one of the images beside it, some have two turns."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        draw_spec(CATEGORIES[number % len(CATEGORIES)], "test", number).render().save(folder / f"{number}.png")
    generator = random.Random(seed)
    records = []
    for number in range(count):
        question = " ".join(generator.choice(QUESTIONS) for _ in range(generator.choice((1, 1, 1, 2, 5))))
        record: dict[str, Any] = {"id": f"record-{number}", "question": question}
        if number % 5 == 4:
            turns = [("user", "is it a circle?"), ("assistant", "no"), ("user", record.pop("question"))]
            record["messages"] = [{"role": role, "content": text} for role, text in turns]
        if number % 3:
            record["image"] = f"{generator.randrange(images)}.png"
        records.append(record)
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, records
