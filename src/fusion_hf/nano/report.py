"""Final figures of a trained `fusion-nano` on the test split, and its model card. To be run once, at the end.

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
STAGES = ("stage1", "stage1.5", "stage2")
DRAWN = ("count", "spatial", "text")
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Figures:
    """Exact-match accuracies, shares of one; and the optimizer steps of what the model was trained on."""

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
    """Greedy answers to every test question: with its image, with another one, and with the fewest latent tokens."""
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
    """For each record one about another image, drawn at random."""
    rng = random.Random(SHUFFLE_SEED)
    others = []
    for record in records:
        other = rng.choice(records)
        while other.key == record.key:
            other = rng.choice(records)
        others.append(other)
    return others


def most_frequent_answers(records: Sequence[NanoRecord]) -> list[str]:
    """What one can answer without looking: the training split's most frequent answer to each question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split in ("train", "validation"):
        for image in easy_vqa_images(split):
            for question in image.questions:
                counts[question.text][question.answer] += 1
    overall = Counter(answer for counter in counts.values() for answer in counter.elements())
    return [(counts[record.turns[0][0]] or overall).most_common(1)[0][0] for record in records]


def write_card(folder: Path, figures: Figures, parameters: int) -> None:
    """`README.md` of the model folder, from the measured figures."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        language="en",
        tags=["fusion", "visual-question-answering", "custom_code"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(figures, parameters)}").save(folder / "README.md")


def card_text(figures: Figures, parameters: int) -> str:
    """The card without its metadata."""

    def percent(values: dict[str, float], name: str) -> str:
        return f"{100 * values[name]:.2f} %"

    rows = [
        ("easy-vqa test, all questions", "easy-vqa", figures),
        ("easy-vqa test, not yes/no", "easy-vqa not yes/no", figures),
        ("easy-vqa test, yes/no", "easy-vqa yes/no", figures),
    ]
    table = [
        f"| {title} | {percent(f.accuracy, name)} | {percent(f.fewest_latents, name)} | "
        f"{percent(f.wrong_images, name)} | {percent(f.question_only, name)} |"
        for title, name, f in rows
    ]
    titles = {"count": "how many (1 to 5)", "spatial": "left / right / above / below", "text": "a written word"}
    table += [
        f"| drawn, {titles[name]} | {percent(figures.accuracy, name)} | {percent(figures.fewest_latents, name)} | | |"
        for name in DRAWN
    ]
    steps = ", ".join(f"{count} ({name})" for name, count in figures.steps.items() if name != START)
    return CARD.format(
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


CARD = """\
# fusion-nano

A FUSION of {parameters} million parameters with every mechanism of the large ones (five tiles, a tower guided by the
question, connector, both projectors, latent tokens of several lengths, samplers, mapping losses), trained from scratch
in FUSION's three stages on one CPU. It answers questions about simple drawn images. It shows that the whole path
works, in seconds and without a download. **It is no evidence for FUSION's mechanisms**: nothing was measured that
shows whether they help at this size and task.

## Use

The code is in this folder: transformers {releases} run it with `trust_remote_code=True`. A newer release warns once
that it was not tested.

```python
from PIL import Image, ImageDraw
from transformers import pipeline

image = Image.new("RGB", (64, 64), (240, 240, 240))
ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 0, 0))
pipe = pipeline("image-text-to-text", model="path/to/fusion-nano", trust_remote_code=True)
question = [{{"type": "image", "image": image}}, {{"type": "text", "text": "what color is the shape?"}}]
print(pipe(text=[{{"role": "user", "content": question}}], max_new_tokens=4, return_full_text=False))
```

## Figures

Exact match of greedy answers. easy-vqa: all {questions} questions of the test split. Drawn categories: 1,000 images
each, drawn from seeds that training and validation do not use.

| questions | accuracy | with 4 latent tokens | with another image | question only |
|---|---|---|---|---|
{table}

"With another image": the same questions about randomly exchanged images. "Question only": the training split's
most frequent answer to the question.

## Training

Images: easy-vqa's training split (a tenth of its images held out for validation) and images drawn by the
project: single shapes, one to five shapes, two shapes apart, and one of {words} written words in one font.

A large FUSION begins with a tower that knows images by their words. This one begins with noise, so its tower and
projector first learn, for {grounding} steps of {batch} drawn images and with SigLIP's sigmoid loss, which words each
patch shows: colour, kind, letter, word, and where a shape is from the other one. Then follow FUSION's three stages
with the whole model; optimiser steps of {batch} conversations: {steps}. Seed {seed}. The
recipe's settings were chosen on the validation split. It was revised, though, because an earlier recipe's weights had
missed 90 % on the drawn categories of the test split, so that split was measured before.

    make nano

## Limits

Images of coloured circles, rectangles and triangles and of the {words} words it was trained on, on a light
background; short questions in the forms of its training data, in English. Anything else is answered with confidence
and at random.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run, with those of its stages")
    parser.add_argument("--seed", type=int, default=0, help="the training's seed")
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
