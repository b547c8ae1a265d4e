"""The words of patches, and what learning them changes."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.drawing.drawn_images import (
    CANVAS_SIDE,
    CATEGORIES,
    DIRECTIONS,
    WORDS,
    DrawnImage,
    DrawnShape,
    draw_spec,
)
from fusion_hf.nano.build import build_config, build_model, build_processor
from fusion_hf.nano.grounding import (
    MIDDLE,
    OVERVIEW_WORDS,
    PATCH_WORDS,
    TILE_WORDS,
    PatchDataset,
    WordGrounding,
    patch_words,
    tile_words,
)
from fusion_hf.nano.training_records import DrawnMixture, training_texts
from fusion_hf.nano.word_tokenizer import build_tokenizer

SIDE = 6


@pytest.fixture(scope="module")
def processor() -> FusionProcessor:
    tokenizer = build_tokenizer(training_texts(mixture=DrawnMixture(single=300, count=300, spatial=300, text=900)))
    return build_processor(tokenizer, build_config(tokenizer))


@pytest.fixture
def model(processor: FusionProcessor) -> FusionForConditionalGeneration:
    return build_model(build_config(processor.tokenizer), seed=0)


def words_at(labels: np.ndarray, row: int, column: int) -> set[str]:
    return {word for word, there in zip(PATCH_WORDS, labels[row, column], strict=True) if there}


@pytest.mark.parametrize("category", CATEGORIES)
def test_parts_are_where_the_image_is_not_background(category: str) -> None:
    for index in range(20):
        spec = draw_spec(category, "train", index)
        union = np.max([np.asarray(part.mask) for part in spec.parts()], axis=0)
        shown = np.asarray(Image.fromarray(union).resize(spec.render().size, Image.Resampling.BILINEAR)) > 0
        differs = (np.asarray(spec.render()) != np.array(spec.background)).any(-1)
        assert (shown & differs).sum() > 0.9 * (shown | differs).sum()


def test_two_shapes_are_told_by_colour_kind_middle_and_relation() -> None:
    left, right = DrawnShape("circle", "red", 5, 50, 24, 24), DrawnShape("rectangle", "blue", 90, 50, 30, 30)
    labels = patch_words(DrawnImage("spatial", (250, 250, 250), (left, right)), SIDE)
    assert words_at(labels, 2, 0) == {"red", "circle", "left", MIDDLE}
    assert words_at(labels, 3, 4) == {"blue", "rectangle", "right"} | {MIDDLE}
    assert words_at(labels, 0, 2) == set()
    assert labels[..., PATCH_WORDS.index(MIDDLE)].sum() == 2


@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
def test_as_many_middles_as_shapes(side: int) -> None:
    for index in range(50):
        spec = draw_spec("count", "train", index)
        labels = patch_words(spec, side)
        assert labels[..., PATCH_WORDS.index(MIDDLE)].sum() == len(spec.shapes)
        assert not labels[..., [PATCH_WORDS.index(word) for word in OVERVIEW_WORDS]].any()


def test_letters_stand_in_reading_order_and_the_word_on_all_of_them() -> None:
    for index in range(20):
        spec = draw_spec("text", "train", index)
        assert spec.word is not None
        labels = patch_words(spec, 4 * SIDE)
        columns = [np.nonzero(labels[..., PATCH_WORDS.index(letter)])[1] for letter in spec.word.text]
        if len(set(spec.word.text)) == len(spec.word.text):
            assert all(first.mean() < second.mean() for first, second in itertools.pairwise(columns))
        written = labels[..., PATCH_WORDS.index(spec.word.text)].astype(bool)
        assert written.any() and (written == labels[..., PATCH_WORDS.index(spec.word.color)].astype(bool)).all()


def test_tiles_are_ordered_as_the_image_processor_orders_them(processor: FusionProcessor) -> None:
    upper_right = DrawnShape("circle", "red", CANVAS_SIDE / 2 + 10, 10, 40, 40)
    item = PatchDataset([DrawnImage("single", (250, 250, 250), (upper_right,))], processor.image_processor, SIDE)[0]
    red = item["labels"][..., PATCH_WORDS.index("red")]
    assert red.any(-1).tolist() == [False, True, False, False, True]
    green = item["pixel_values"][:, 1].unfold(2, 8, 8).unfold(1, 8, 8)  # (5, row, column, 8, 8)
    patches = green.flatten(3).mean(-1).flatten(1)  # (5, N)
    assert (patches[1][red[1].bool()].max() < patches[1][~red[1].bool()].min()) and patches[0].std() < 1e-3


def test_tiles_are_not_asked_for_what_only_the_overview_shows(
    model: FusionForConditionalGeneration, processor: FusionProcessor
) -> None:
    item = PatchDataset([draw_spec("text", "train", 0)], processor.image_processor, SIDE)[0]
    pixel_values, labels = item["pixel_values"][None], item["labels"][None]
    grounding = WordGrounding(model, processor.tokenizer)
    changed = labels.clone()
    changed[:, :4, :, len(TILE_WORDS) :] = 1 - changed[:, :4, :, len(TILE_WORDS) :]
    assert not torch.equal(changed, labels)
    assert torch.equal(grounding(pixel_values, changed).loss, grounding(pixel_values, labels).loss)
    changed[:, 4:, :, len(TILE_WORDS) :] = 1
    assert grounding(pixel_values, changed).loss > grounding(pixel_values, labels).loss


def test_learning_words_changes_tower_and_projector_alone(
    model: FusionForConditionalGeneration, processor: FusionProcessor
) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grounding = WordGrounding(model, processor.tokenizer)
    dataset = PatchDataset(
        [draw_spec(category, "train", index) for category in CATEGORIES for index in range(2)],
        processor.image_processor,
        SIDE,
    )
    items = [dataset[index] for index in range(len(dataset))]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    optimizer = torch.optim.AdamW(grounding.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = grounding(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all(name.startswith(("model.vision_tower.", "model.vision_projector.")) for name in changed)


def test_relation_and_written_words_have_tokens(processor: FusionProcessor) -> None:
    assert set(DIRECTIONS) | set(WORDS) == set(OVERVIEW_WORDS)
    tokenizer = build_tokenizer(["red"])
    with pytest.raises(ValueError, match=r"'black' must be a single token.*got 5 tokens"):
        WordGrounding(build_model(build_config(tokenizer), seed=0), tokenizer)
    assert tile_words(draw_spec("single", "train", 0), SIDE).shape == (5, SIDE**2, len(PATCH_WORDS))
