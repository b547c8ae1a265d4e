"""Batches of the collator: labels, and the compact form that a training passes on."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.training_runs import write_model

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.training import FusionDataCollator
from fusion_hf.training.collator import IGNORE_INDEX, SMALL_BYTES, Batch, labelled_positions

WORDS = "what color is the shape of circles red two <|im_end|> <image> assistant".split()


@pytest.fixture(scope="module")
def processor():
    return FusionProcessor.from_pretrained(nano_path())


def make_records(count, seed=0, pictures=0.6):
    """Conversations of some turns; some begin with a system message, some have a picture."""
    rng = random.Random(seed)

    def words(least, most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    records = []
    for number in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": words(0, 6)})
            messages.append({"role": "assistant", "content": words(1, 6)})
        if rng.random() < 0.3:
            messages.insert(0, {"role": "system", "content": words(1, 4)})
        record = {"id": str(number), "messages": messages}
        if rng.random() < pictures:
            pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            record["image"] = Image.fromarray(pixels)
        records.append(record)
    return records


def test_answers_and_their_ends_are_labelled_and_nothing_else(processor):
    """Also where a question repeats an answer, or text looks like the end of one; other rows have other lengths."""
    messages = [
        {"role": "system", "content": "red"},
        {"role": "user", "content": "is the shape red <|im_end|> two"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "two <|im_end|> two"},
    ]
    batch = FusionDataCollator(processor, [4])([{"messages": messages}, *make_records(3)])
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    kept = labels != IGNORE_INDEX
    assert torch.equal(labels[kept], ids[kept])
    tokens = processor.tokenizer.convert_ids_to_tokens(labels[kept])
    ends = [place for place, token in enumerate(tokens) if token == "<|im_end|>"]
    assert ends == [1, len(tokens) - 1] and tokens[0] == "red"
    assert processor.tokenizer.decode(labels[kept][2:-1]) == "two <|im_end|> two"


@pytest.mark.parametrize("pictures", [0.0, 0.5, 1.0])
def test_a_compact_batch_becomes_the_same_numbers(processor, pictures):
    records = make_records(6, seed=1, pictures=pictures)
    plain = FusionDataCollator(processor, [4])(records)
    collator = FusionDataCollator(processor, [4], compact=True)
    compact = collator(records)
    unpacked = collator.unpack(compact)
    assert unpacked.keys() - plain.keys() == {"logits_to_keep", "shift_labels"}
    assert unpacked["query_len"] == plain.pop("query_len")
    for name, expected in plain.items():
        assert unpacked[name].dtype == expected.dtype
        assert torch.equal(unpacked[name], expected), name
    assert ("pixel_values" in unpacked) == (pictures > 0)
    if pictures:
        assert compact["pixel_bytes"].dtype == torch.uint8
        signs = (torch.signbit(unpacked["pixel_values"]), torch.signbit(plain["pixel_values"]))
        assert torch.equal(*signs), "zeros without a sign"


def test_other_means_are_unpacked_as_well(processor):
    images = processor.image_processor
    mean, images.image_mean = images.image_mean, [0.4, 0.5, 0.6]
    try:
        records = make_records(3, seed=2, pictures=1.0)
        collator = FusionDataCollator(processor, [4], compact=True)
        expected = FusionDataCollator(processor, [4])(records)["pixel_values"]
        assert torch.equal(collator.unpack(collator(records))["pixel_values"], expected)
    finally:
        images.image_mean = mean


def test_a_plain_batch_is_unpacked_already(processor):
    batch = FusionDataCollator(processor, [4])(make_records(2))
    assert FusionDataCollator(processor, [4], compact=True).unpack(batch).keys() == batch.keys()


def test_positions_are_those_before_labels():
    labels = torch.tensor([[-100, 5, -100, -100, 7], [-100, -100, -100, -100, 8]])
    positions = labelled_positions(labels)
    assert positions["logits_to_keep"].tolist() == [0, 3]
    assert positions["shift_labels"].tolist() == [[5, 7], [-100, 8]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny")
    return FusionForConditionalGeneration.from_pretrained(folder), FusionProcessor.from_pretrained(folder)


@pytest.mark.parametrize("records", [make_records(4, seed=3), [{"skipped": "broken"}]], ids=["records", "no label"])
def test_logits_before_labels_are_enough_for_loss_and_gradient(model, records):
    model, processor = model
    results = []
    for compact in (False, True):
        collator = FusionDataCollator(processor, [4], compact=compact)
        outputs = model(**collator.unpack(collator(records)))
        model.zero_grad(set_to_none=False)
        # the mean over no label is no number, in both
        (outputs.loss if torch.isfinite(outputs.loss) else outputs.mapping_loss).backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        results.append((outputs.loss, gradients, outputs.logits.shape[1]))
    (loss, gradient, length), (compact_loss, compact_gradient, compact_length) = results
    torch.testing.assert_close(compact_loss, loss, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(compact_gradient, gradient, rtol=1e-4, atol=1e-7)
    assert compact_length < length


def test_batches_pass_unchanged_from_a_worker(processor):
    """Small tensors by value, large ones in shared memory; both arrive as they were, and writable."""
    collator = FusionDataCollator(processor, [4], compact=True)
    records = make_records(8, pictures=1.0)
    here = collator(records)
    assert here["pixel_bytes"].nbytes > SMALL_BYTES > here["input_ids"].nbytes
    loader = torch.utils.data.DataLoader(records, batch_size=8, collate_fn=collator, num_workers=1)
    (passed,) = list(loader)
    assert type(passed) is Batch and passed.keys() == here.keys()
    for name, value in here.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(passed[name], value) and passed[name].dtype == value.dtype
            passed[name].zero_()
        else:
            assert passed[name] == value
