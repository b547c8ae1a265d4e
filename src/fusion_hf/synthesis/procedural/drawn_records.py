"""Records that this package draws, with exact facts and without a model."""

import random
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from fusion_hf.drawing.drawn_images import DrawnImage
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.procedural.scenes import WORDINGS, draw_pair
from fusion_hf.synthesis.procedural.turn_writers import SCENES, any_scene, write_pair_turns, write_turns
from fusion_hf.synthesis.run_config import PROCEDURAL
from fusion_hf.synthesis.synth_record import StepOrigin, SynthRecord

MOST_TRIES = 100  # attempts to draw a scene with enough questions


class PlannedRecord(NamedTuple):
    """A record, and the specifications of its images."""

    record: SynthRecord
    specs: tuple[DrawnImage, ...]


class DrawnRecord(NamedTuple):
    """A record and its images. The caller chooses file names."""

    record: SynthRecord
    images: tuple[Image.Image, ...]


def draw(category: str, seed: int, index: int) -> DrawnRecord:
    """
    Draw a record of a category. The result depends only on the arguments.

    Args:
        category: the name of the category.
        seed: the seed.
        index: the number of the record.

    Raises:
        ValueError: if the category is unknown.

    Example:

        record, images = draw("SynthCount", seed=0, index=3)
        images[0].save(f"{record.id}.png")
    """
    planned = plan(category, seed, index)
    return DrawnRecord(planned.record, tuple(spec.render() for spec in planned.specs))


def plan(category: str, seed: int, index: int) -> PlannedRecord:
    """
    Plan a record as `draw` does, without drawing its images.

    Args:
        category: the name of the category.
        seed: the seed.
        index: the number of the record.

    Raises:
        ValueError: if the category is unknown.
    """
    categories = load_categories()
    if category not in categories:
        raise ValueError(f"`category` must be one of {', '.join(categories)}, got {category!r}.")
    settings = categories[category]
    rng = random.Random(f"synthesis/{category}/{seed}/{index}")
    for _ in range(MOST_TRIES):
        if settings.pictures == 2:
            pair = draw_pair(rng).worded(rng.randrange(WORDINGS))
            scenes = [pair.first, pair.second]
            turns = write_pair_turns(settings, pair, rng)
        else:
            scene = SCENES.get(category, any_scene)(rng)
            scenes = [replace(scene, wording=rng.randrange(WORDINGS))]
            turns = write_turns(settings, scenes[0], rng)
        if len(turns) >= settings.turns[0]:
            break
    else:
        raise RuntimeError(f"{category}: none of {MOST_TRIES} scenes has {settings.turns[0]} questions.")
    origin = StepOrigin(PROCEDURAL, settings.prompts_hash, seed)
    record = SynthRecord(
        id=f"{category}-{seed}-{index}",
        category=category,
        caption=scenes[0].caption(),
        seed=seed,
        descriptions=tuple(scene.stated() for scene in scenes),
        turns=turns,
        facts={"pictures": [scene.facts() for scene in scenes]},
        origins=dict.fromkeys(("describe", "images", "write_qa"), origin),
    )
    return PlannedRecord(record, tuple(scene.spec for scene in scenes))
