"""The bundled fusion-nano: it answers, its figures are what was asked for, and its card states them."""

import json
from pathlib import Path

import pytest
import torch

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.hub.family import PAPER, REPOSITORY
from fusion_hf.inference import nano_path
from fusion_hf.nano.evaluate import accuracies, generate_answers
from fusion_hf.nano.report import DRAWN, FIGURES, Figures, card_text, measure
from fusion_hf.nano.training_records import evaluation_records

FOLDER = Path(nano_path())
FIRST_QUESTIONS = 40  # of each category


@pytest.fixture(scope="module")
def model() -> FusionForConditionalGeneration:
    return FusionForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor() -> FusionProcessor:
    return FusionProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def figures() -> Figures:
    return Figures(**json.loads((FOLDER / FIGURES).read_text()))


def test_figures_are_as_required(figures: Figures) -> None:
    assert figures.questions == 9673
    assert figures.accuracy["easy-vqa"] >= 0.985 and figures.accuracy["easy-vqa not yes/no"] >= 0.99
    assert figures.wrong_images["easy-vqa"] < 0.65
    assert all(figures.accuracy[category] >= 0.9 for category in DRAWN)
    assert round(100 * figures.question_only["easy-vqa"], 1) == 67.0
    assert round(100 * figures.question_only["easy-vqa not yes/no"], 1) == 23.3


def test_the_card_states_the_figures(figures: Figures, model: FusionForConditionalGeneration) -> None:
    card = (FOLDER / "README.md").read_text()
    assert card.endswith(card_text(figures, model.num_parameters()))
    for address in (PAPER, REPOSITORY, "https://github.com/vzhou842/easy-VQA"):
        assert f"]({address})" in card


def test_it_answers_validation_questions(model: FusionForConditionalGeneration, processor: FusionProcessor) -> None:
    by_category: dict[str, list] = {}
    for record in evaluation_records("validation", drawn=FIRST_QUESTIONS):
        by_category.setdefault(record.category, []).append(record)
    assert set(by_category) == {"easy-vqa", *DRAWN}
    records = [record for group in by_category.values() for record in group[:FIRST_QUESTIONS]]
    scores = accuracies(records, generate_answers(model, processor, records))
    assert all(scores[category] >= 0.85 for category in by_category), scores


@pytest.mark.slow
def test_the_figures_come_out_again(
    model: FusionForConditionalGeneration, processor: FusionProcessor, figures: Figures
) -> None:
    again = measure(model, processor, figures.seed, figures.steps)
    assert again.accuracy == pytest.approx(figures.accuracy, abs=2e-3)  # another processor may round another way
    assert again.fewest_latents == pytest.approx(figures.fewest_latents, abs=2e-3)
    assert again.wrong_images == pytest.approx(figures.wrong_images, abs=2e-3)
    assert again.question_only == figures.question_only
