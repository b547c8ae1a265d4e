"""Measure a trained `fusion-nano` on the test split, and write its model card. Run it once, at the end.

Tested command: `python -m fusion_hf.nano.report runs/fusion-nano` (the last step of `make nano`).
"""

import argparse
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from fusion_hf.drawing.drawn_images import WORDS
from fusion_hf.model.compatibility_fusion import TESTED
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.nano.evaluate import accuracies, generate_answers
from fusion_hf.nano.start import BATCH_SIZE, FINISHED, START
from fusion_hf.nano.training_records import NanoRecord, easy_vqa_images, test_records

logger = logging.getLogger(__name__)

FIGURES = "figures.json"
CARD = Path(__file__).with_name("card.md")
STAGES = ("stage1", "stage1.5", "stage2")
DRAWN = {"count": "how many (1 to 5)", "spatial": "left / right / above / below", "text": "a written word"}
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Figures:
    """Exact-match accuracies from 0 to 1, and the number of optimizer steps of each stage of training."""

    questions: int
    seed: int
    accuracy: dict[str, float]
    wrong_images: dict[str, float]
    question_only: dict[str, float]
    fewest_latents: dict[str, float]
    steps: dict[str, int]


def measure(
    model: FusionForConditionalGeneration, processor: FusionProcessor, seed: int, steps: dict[str, int]
) -> Figures:
    """
    Answer all test questions greedily: with their images, with other images, and with the fewest latent tokens.

    Args:
        model: The model.
        processor: Its processor.
        seed: Seed of the training.
        steps: Optimizer steps by stage.

    Returns:
        The figures.
    """
    records = test_records(seed)
    easy_vqa = [record for record in records if record.category == "easy-vqa"]
    answers = generate_answers(model, processor, records)
    wrong = generate_answers(model, processor, easy_vqa, images=[r.open_image() for r in shuffled(easy_vqa)])
    fewest = generate_answers(model, processor, records, query_len=min(model.config.query_lens))
    return Figures(
        questions=len(easy_vqa),
        seed=seed,
        accuracy=accuracies(records, answers),
        wrong_images=accuracies(easy_vqa, wrong),
        question_only=accuracies(easy_vqa, most_frequent_answers(easy_vqa)),
        fewest_latents=accuracies(records, fewest),
        steps=steps,
    )


def shuffled(records: Sequence[NanoRecord]) -> list[NanoRecord]:
    """Draw, for each record, a record about another image."""
    rng = random.Random(SHUFFLE_SEED)
    others = []
    for record in records:
        other = rng.choice(records)
        while other.key == record.key:
            other = rng.choice(records)
        others.append(other)
    return others


def most_frequent_answers(records: Sequence[NanoRecord]) -> list[str]:
    """Return the most frequent training answer to each question, which is a guess without looking at the image."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split in ("train", "validation"):
        for image in easy_vqa_images(split):
            for question in image.questions:
                counts[question.text][question.answer] += 1
    overall = Counter(answer for counter in counts.values() for answer in counter.elements())
    return [(counts[record.turns[0][0]] or overall).most_common(1)[0][0] for record in records]


def write_card(folder: Path, figures: Figures, parameters: int) -> None:
    """Write `README.md` of the model folder from the measured figures."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        language="en",
        tags=["fusion", "visual-question-answering", "custom_code"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(figures, parameters)}").save(folder / "README.md")


def card_text(figures: Figures, parameters: int) -> str:
    """Write the text of the card without its metadata."""

    def percent(values: dict[str, float], name: str) -> str:
        return f"{100 * values[name]:.2f} %"

    easy_vqa = {"easy-vqa": "all questions", "easy-vqa not yes/no": "not yes/no", "easy-vqa yes/no": "yes/no"}
    table = [
        f"| easy-vqa test, {title} | {percent(figures.accuracy, name)} | {percent(figures.fewest_latents, name)} | "
        f"{percent(figures.wrong_images, name)} | {percent(figures.question_only, name)} |"
        for name, title in easy_vqa.items()
    ]
    table += [
        f"| drawn, {title} | {percent(figures.accuracy, name)} | {percent(figures.fewest_latents, name)} | | |"
        for name, title in DRAWN.items()
    ]
    steps = ", ".join(f"{count} ({name})" for name, count in figures.steps.items() if name != START)
    return CARD.read_text(encoding="utf-8").format(
        parameters=f"{parameters / 1e6:.2f}",
        questions=figures.questions,
        table="\n".join(table),
        grounding=figures.steps[START],
        batch=BATCH_SIZE,
        steps=steps,
        seed=figures.seed,
        words=len(WORDS),
        releases=TESTED,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run, with the folders of its stages")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the training (default: %(default)s)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    folder = arguments.run / STAGES[-1]
    steps = {name: json.loads((arguments.run / name / FINISHED).read_text())["steps"] for name in (START, *STAGES)}
    model = FusionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    figures = measure(model, FusionProcessor.from_pretrained(folder), arguments.seed, steps)
    (folder / FIGURES).write_text(json.dumps(asdict(figures), indent=2) + "\n")
    write_card(folder, figures, model.num_parameters())
    logger.info("%s", json.dumps(asdict(figures), indent=2))


if __name__ == "__main__":
    main()
