"""Batches of the collator: labels, and the compact form that a training passes on."""

import base64
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.training_runs import write_model

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.training import FusionDataCollator
from fusion_hf.training.collator import IGNORE_INDEX, SMALL_BYTES, Batch, find_loss_positions
from fusion_hf.training.query_len_records import with_query_lens

WORDS = "what color is the shape of circles red two <|im_end|> <latent_image> assistant".split()


@pytest.fixture(scope="module")
def processor():
    return FusionProcessor.from_pretrained(nano_path())


def make_records(count, seed=0, images=0.6):
    """Conversations of some turns; some begin with a system message, some have an image."""
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
        if rng.random() < images:
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


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
ANSWER = {"role": "assistant", "content": "red"}


def asking(content, answer=ANSWER):
    return [{"role": "user", "content": content}, answer]


LAYOUTS = {
    "a list": {"images": [IMAGE], "messages": asking("what color ?")},
    "a list and a mark": {"images": [IMAGE], "messages": asking("<image>what color ?")},
    "a list and a block": {
        "images": [IMAGE],
        "messages": asking([{"type": "image"}, {"type": "text", "text": "what color ?"}]),
    },
    "a row of a table": {
        "image": None,
        "images": [IMAGE],
        "conversations": None,
        "messages": asking([{"type": "image", "text": None}, {"type": "text", "text": "what color ?", "image": None}]),
    },
    "a block": {"messages": asking([{"type": "text", "text": "what color ?"}, {"type": "image", "image": IMAGE}])},
    "a mark in the middle": {"image": IMAGE, "messages": asking("what <image>color ?")},
    "a mark in a block": {"image": IMAGE, "messages": asking([{"type": "text", "text": "<image>\nwhat color ?"}])},
    "a mark in an answer": {
        "image": IMAGE,
        "messages": asking("what color ?", {"role": "assistant", "content": "<image>red"}),
    },
    "conversations": {
        "images": [IMAGE],
        "conversations": [{"from": "human", "value": "what color ?"}, {"from": "gpt", "value": "red"}],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_an_image_is_read(processor, layout):
    turns = [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": "red"}]
    collator = FusionDataCollator(processor, [4])
    expected, found = collator([{"image": IMAGE, "conversations": turns}]), collator([LAYOUTS[layout]])
    assert int((found["input_ids"] == processor.image_token_id).sum()) == processor.num_image_tokens
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_a_path_or_an_address_in_a_block_is_read(processor, tmp_path):
    IMAGE.save(tmp_path / "image.png")
    collator = FusionDataCollator(processor, [4])
    expected = collator([{"image": IMAGE, "messages": asking("what color ?")}])["pixel_values"]
    content = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    blocks = [
        {"type": "image", "path": str(tmp_path / "image.png")},
        {"type": "image", "base64": content},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}},
    ]
    for block in blocks:
        text = {"type": "text", "text": "what color ?"}
        assert torch.equal(collator([{"messages": asking([block, text])}])["pixel_values"], expected)


REFUSED = {
    "two images": ({"images": [IMAGE, IMAGE], "messages": asking("x")}, "must have at most one image, got 2"),
    "twice": ({"image": IMAGE, "images": [IMAGE], "messages": asking("x")}, "must have at most one image, got 2"),
    "block and field": (
        {"images": [IMAGE], "messages": asking([{"type": "image", "image": IMAGE}])},
        "must have at most one image, got 2",
    ),
    "only a mark": ({"images": [], "messages": asking("<image>x")}, "has an <image> mark but no image"),
    "only a block": ({"messages": asking([{"type": "image"}])}, "has an <image> mark but no image"),
    "image of the assistant": (
        {"messages": [*asking("x", {"role": "assistant", "content": [{"type": "image", "image": IMAGE}]})]},
        "of the role 'user' only, got the role 'assistant'",
    ),
    "other fields": (
        {"images": [IMAGE], "prompt": asking("x")},
        "must have conversations, messages, texts, or prompt and completion; got id, images",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_left_out_is_refused(processor, case):
    record, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        FusionDataCollator(processor, [4])([{"id": "seven", **record}])
    assert "'seven'" in str(error.value)


def test_records_with_images_in_any_layout_are_grouped_together():
    lengths = with_query_lens([*LAYOUTS.values(), {"messages": asking("what color ?")}]).lengths
    assert lengths.tolist() == [4] * len(LAYOUTS) + [-4]


@pytest.mark.parametrize("images", [0.0, 0.5, 1.0])
def test_a_compact_batch_becomes_the_same_numbers(processor, images):
    records = make_records(6, seed=1, images=images)
    plain = FusionDataCollator(processor, [4])(records)
    collator = FusionDataCollator(processor, [4], compact=True)
    compact = collator(records)
    unpacked = collator.unpack(compact)
    assert unpacked.keys() - plain.keys() == {"loss_positions"}
    assert unpacked["query_len"] == plain.pop("query_len")
    for name, expected in plain.items():
        assert unpacked[name].dtype == expected.dtype
        assert torch.equal(unpacked[name], expected), name
    assert ("pixel_values" in unpacked) == (images > 0)
    if images:
        assert compact["pixel_bytes"].dtype == torch.uint8
        signs = (torch.signbit(unpacked["pixel_values"]), torch.signbit(plain["pixel_values"]))
        assert torch.equal(*signs), "zeros without a sign"


def test_other_means_are_unpacked_as_well(processor):
    images = processor.image_processor
    mean, images.image_mean = images.image_mean, [0.4, 0.5, 0.6]
    try:
        records = make_records(3, seed=2, images=1.0)
        collator = FusionDataCollator(processor, [4], compact=True)
        expected = FusionDataCollator(processor, [4])(records)["pixel_values"]
        assert torch.equal(collator.unpack(collator(records))["pixel_values"], expected)
    finally:
        images.image_mean = mean


def test_a_plain_batch_is_unpacked_already(processor):
    batch = FusionDataCollator(processor, [4])(make_records(2))
    assert FusionDataCollator(processor, [4], compact=True).unpack(batch).keys() == batch.keys()


def test_positions_are_those_before_labels():
    labels = torch.tensor([[-100, 5, -100, -100, 7], [6, -100, -100, -100, 8]])
    assert find_loss_positions(labels).tolist() == [0, 3, 8]  # nothing is before the 6
    assert labels[1, 0] == 6
    assert find_loss_positions(labels[:, :1]).tolist() == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny")
    return FusionForConditionalGeneration.from_pretrained(folder), FusionProcessor.from_pretrained(folder)


@pytest.mark.parametrize("records", [make_records(4, seed=3), [{"skipped": "broken"}]], ids=["records", "no label"])
def test_labelled_tokens_are_enough_for_loss_and_gradient(model, records):
    model, processor = model
    results = []
    for compact in (False, True):
        collator = FusionDataCollator(processor, [4], compact=compact)
        outputs = model(**collator.unpack(collator(records)))
        model.zero_grad(set_to_none=False)
        # the mean over no label is no number, in both
        (outputs.loss if torch.isfinite(outputs.loss) else outputs.mapping_loss).backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        results.append((outputs.loss, gradients))
        assert (outputs.logits is None) == compact
    (loss, gradient), (compact_loss, compact_gradient) = results
    torch.testing.assert_close(compact_loss, loss, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(compact_gradient, gradient, rtol=1e-4, atol=1e-7)


def test_batches_pass_unchanged_from_a_worker(processor):
    """Small tensors by value, large ones in shared memory; both arrive as they were, and writable."""
    collator = FusionDataCollator(processor, [4], compact=True)
    records = make_records(8, images=1.0)
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


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        (
            "{%- set conversation.block = latents -%}",
            "{%- set conversation.block = '' -%}",
            "2 `prompt_end_positions` but 1 latent blocks",
        ),
        (
            "{{- text + '<|im_end|>' -}}",
            "{{- text + latents + '<|im_end|>' -}}",
            r"`prompt_end_positions\[1\]` must be from .* got \d+",
        ),
    ],
)
def test_prompts_that_the_model_would_refuse_are_refused_here(written, instead, message, compact):
    """In the data worker, by the same check: of a chat template of one's own that misplaces the latent blocks."""
    processor = FusionProcessor.from_pretrained(nano_path())
    assert written in processor.chat_template
    processor.chat_template = processor.chat_template.replace(written, instead)
    turns = [("user", "one"), ("assistant", "a"), ("user", "two"), ("assistant", "b")]
    messages = [{"role": role, "content": text} for role, text in turns]
    record = {"messages": messages, "image": Image.new("RGB", (8, 8))}
    with pytest.raises(ValueError, match=f"Sample 0.*{message}"):
        FusionDataCollator(processor, compact=compact)([record])
