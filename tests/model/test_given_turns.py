"""Turns and questions that a caller gives: what is only written otherwise is taken, what is wrong is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.chat_models import TURNS, bare, chat, encode, load_chat_model, make_chat_model
from tests.helpers.hub_folder import run

from fusion_hf import CompiledGenerator, FusionForConditionalGeneration, FusionProcessor

MODELS = ("nano", "phi3")  # placeholders inside the vocabulary, and behind it
ENDS, QUESTION, QUESTION_MASK = TURNS
IGNORED = -100
GREEDY = {"max_new_tokens": 4, "do_sample": False}
# what folders from before turns were found in ids do not have
NEW_FIELDS = (
    *("assistant_header_ids", "assistant_header_tail", "user_header_ids", "user_header_tail", "turn_end_token_id"),
    *("question_separator_ids", "question_prefix_ids", "questions_are_cut"),
)

Pair = tuple[FusionForConditionalGeneration, FusionProcessor]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Pair:
    return make_chat_model(request.param, tmp_path_factory.mktemp(request.param))


def two_turns(processor: FusionProcessor) -> dict[str, Any]:
    return encode(processor, chat("what?", "red", "why is it?"))


@torch.no_grad()
@pytest.mark.parametrize(
    "write",
    [
        lambda ends: ends.int(),
        lambda ends: ends.short(),
        lambda ends: ends.to(torch.uint8),
        lambda ends: torch.nn.functional.pad(ends, (1, 0), value=-1),
        lambda ends: torch.nn.functional.pad(ends, (0, 2), value=-1),
        lambda ends: torch.nn.functional.pad(ends, (2, 1), value=0),
        lambda ends: torch.tensor([[ends[0, 0], -1, ends[0, 1]]]),
    ],
)
def test_positions_written_otherwise(pair: Pair, write: Any) -> None:
    model, processor = pair
    inputs = two_turns(processor)
    written = inputs | {ENDS: write(inputs[ENDS])}
    torch.testing.assert_close(model(**written).logits, model(**inputs).logits)
    assert torch.equal(model.generate(**written, **GREEDY), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda ends: ends.float(), "tensor of integers, got torch.float32"),
        (lambda ends: ends > 0, "tensor of integers, got torch.bool"),
        (lambda ends: ends.numpy(), "tensor of integers, got ndarray"),
        (lambda ends: ends.tolist(), "tensor of integers, got list"),
        (lambda ends: int(ends[0, 0]), "tensor of integers, got int"),
        (lambda ends: ends[0], r"shape \(B, R\) with B = 1 samples, got \(2,\)"),
        (lambda ends: ends[None], r"shape \(B, R\) with B = 1 samples, got \(1, 1, 2\)"),
        (lambda ends: ends.repeat(2, 1), r"shape \(B, R\) with B = 1 samples, got \(2, 2\)"),
        (lambda ends: ends[:0], r"shape \(B, R\) with B = 1 samples, got \(0, 2\)"),
        (lambda ends: torch.zeros(3, 0), r"shape \(B, R\) with B = 1 samples, got \(3, 0\)"),
        (lambda ends: ends.flip(1), "Sample 0: .* must be the ends of its assistant headers"),
        (lambda ends: ends[:, :1].repeat(1, 2), "Sample 0: .* must be the ends of its assistant headers"),
        (lambda ends: ends[:, [0, 1, 1]], "Sample 0: .* must be the ends of its assistant headers"),
        (lambda ends: ends[:, 1:], "Sample 0: .* must be the ends of its assistant headers"),
        (lambda ends: ends - 1, "Sample 0: .* must be the ends of its assistant headers"),
        (lambda ends: ends + 500, "Sample 0: .* must be the ends of its assistant headers"),
        (
            lambda ends: torch.full_like(ends, 20),
            "Sample 0: .* must be the ends of its assistant headers",
        ),  # in the image
        # what asks for no samplers is empty
        (lambda ends: torch.full_like(ends, -1), r"must be the ends of its assistant headers.* got \[\].*\(B, 0\)"),
        (lambda ends: torch.zeros_like(ends), r"must be the ends of its assistant headers.* got \[\].*\(B, 0\)"),
        (lambda ends: torch.tensor([[-2, -7]]), "must be the ends of its assistant headers"),
    ],
)
def test_wrong_positions_are_refused(pair: Pair, write: Any, said: str) -> None:
    model, processor = pair
    inputs = two_turns(processor)
    written = inputs | {ENDS: write(inputs[ENDS])}
    for call in (lambda: model(**written), lambda: model.generate(**written, **GREEDY)):
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert f"`{ENDS}`" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({QUESTION: lambda ids: ids.float()}, f"`{QUESTION}` must be a tensor of integers"),
        ({QUESTION: lambda ids: ids > 0}, f"`{QUESTION}` must be a tensor of integers"),
        ({QUESTION: lambda ids: ids.tolist()}, f"`{QUESTION}` must be a tensor, got list"),
        ({QUESTION: lambda ids: ids[0]}, rf"`{QUESTION}` must have the shape \(B, T\)"),
        ({QUESTION: lambda ids: ids.repeat(2, 1)}, rf"`{QUESTION}` must have the shape \(B, T\)"),
        ({QUESTION: lambda ids: ids[:, :0]}, f"`{QUESTION_MASK}` must have the shape of"),
        ({QUESTION_MASK: lambda mask: mask[:, 1:]}, f"`{QUESTION_MASK}` must have the shape of"),
        ({QUESTION_MASK: lambda mask: mask.repeat(2, 1)}, rf"`{QUESTION_MASK}` must have the shape \(B, T\)"),
        ({QUESTION: lambda ids: ids - 1000}, f"`{QUESTION}` must hold ids from 0 to"),
        ({QUESTION: lambda ids: ids + 10**6}, f"`{QUESTION}` must hold ids from 0 to"),
        ({"attention_mask": lambda mask: mask[:, 3:]}, "`attention_mask` must cover `input_ids`"),
        ({"attention_mask": lambda mask: mask.repeat(2, 1)}, "`attention_mask` must cover `input_ids`"),
        ({"input_ids": lambda ids: ids.tolist()}, r"`input_ids` must be a tensor of shape \(B, S\), got list"),
        ({"input_ids": lambda ids: ids[0]}, r"`input_ids` must be a tensor of shape \(B, S\)"),
    ],
)
def test_wrong_questions_masks_and_ids_are_refused(pair: Pair, changes: dict[str, Any], said: str) -> None:
    model, processor = pair
    inputs = two_turns(processor)
    changed = {name: change(inputs[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=said):
        model(**inputs | changed)


@torch.no_grad()
def test_one_of_both_may_be_missing(pair: Pair) -> None:
    model, processor = pair
    inputs = two_turns(processor)
    expected = model(**inputs).logits
    for missing in ((ENDS,), (QUESTION,), (QUESTION_MASK,), (QUESTION, QUESTION_MASK), (ENDS, QUESTION)):
        given = {name: value for name, value in inputs.items() if name not in missing}
        torch.testing.assert_close(model(**given).logits, expected)


@torch.no_grad()
def test_an_image_without_latent_tokens_still_has_its_question(pair: Pair) -> None:
    model, processor = pair
    text = processor.apply_chat_template(chat("what is it?"), add_generation_prompt=True)
    text = text.replace("<vision_start>" + "<latent_image>" * processor.query_len + "<vision_end>", "")
    assert "<latent_image>" not in text
    inputs = dict(processor(images=chat("")[0]["content"][0]["image"], text=text, return_tensors="pt"))
    torch.testing.assert_close(model(**bare(inputs)).logits, model(**inputs).logits)


def test_an_end_inside_an_answer_without_a_header_is_refused(pair: Pair) -> None:
    """Where no header tells, the labels do."""
    model, processor = pair
    image = chat("")[0]["content"][0]["image"]
    inputs = dict(processor(images=[image], text=["<image><latent_image>what is it? it is red"], return_tensors="pt"))
    last = inputs["input_ids"].shape[1] - 1
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    assert torch.isfinite(model(**inputs | {ENDS: torch.tensor([[last - 2]])}, labels=labels).loss)
    with pytest.raises(ValueError, match=rf"Sample 0: `{ENDS}\[0\]` must be before the answer.*got {last}"):
        model(**inputs | {ENDS: torch.tensor([[last]])}, labels=labels)


@torch.no_grad()
def test_rows_are_put_right_only_if_padding_moved_them(pair: Pair) -> None:
    """A batch whose left padding was taken away has its positions too far right, all by what was taken."""
    model, processor = pair
    processor.tokenizer.padding_side = "right"
    inputs = encode(processor, [chat("what?"), chat("what color is the shape?")], processor_kwargs={"padding": True})
    missing = inputs["attention_mask"].sum(1).max() - inputs["attention_mask"].sum(1)
    moved = inputs | {ENDS: inputs[ENDS] + missing[:, None]}
    torch.testing.assert_close(model(**moved).logits, model(**inputs).logits)
    for row in range(2):
        wrong = inputs[ENDS].clone()
        wrong[row] += 2
        with pytest.raises(ValueError, match=f"Sample {row}: `{ENDS}` must be the ends of its assistant headers"):
            model(**inputs | {ENDS: wrong})


@pytest.mark.slow
def test_a_compiled_generator_finds_turns(pair: Pair) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what color is the shape?"))
    generator = CompiledGenerator(model, [128], GREEDY["max_new_tokens"], compile_prompt=True, backend="eager")
    try:
        found = generator.generate(**bare(inputs), do_sample=False)
        assert torch.equal(found, model.generate(**inputs, **GREEDY))
    finally:
        torch._dynamo.reset()


def old_folder(model: FusionForConditionalGeneration, folder: Path) -> Path:
    """A copy of a model's folder as it was before its configuration said how turns are written."""
    shutil.copytree(model.config._name_or_path, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in NEW_FIELDS:
        config.pop(name, None)  # fields with their default value are not written
    assert not any("header" in name for name in config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@torch.no_grad()
def test_old_folders_answer_as_before_and_name_what_they_cannot_find(pair: Pair, tmp_path: Path) -> None:
    model, processor = pair
    old, old_processor = load_chat_model(old_folder(model, tmp_path / "old"))
    batch = [chat("what?"), chat("is it red?", "no", "why?"), chat("hello", image=None)]
    processor.tokenizer.padding_side = old_processor.tokenizer.padding_side = "left"
    inputs = encode(old_processor, batch, processor_kwargs={"padding": True})
    assert all(torch.equal(inputs[name], value) for name, value in encode(processor, batch).items())
    assert torch.equal(old(**inputs).logits, model(**inputs).logits)
    assert torch.equal(old.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    for name in (ENDS, QUESTION):
        given = {key: value for key, value in inputs.items() if key != name}
        for call in (lambda given=given: old(**given), lambda given=given: old.generate(**given, **GREEDY)):
            with pytest.raises(ValueError, match=rf"`{name}` is missing.*`assistant_header_ids`.*empty `\(B, 0\)`"):
                call()
    nothing = inputs["input_ids"][:, :0]
    assert torch.isfinite(old(**bare(inputs) | {ENDS: nothing, QUESTION: nothing}).logits).all()
    text = encode(old_processor, chat("hello", image=None))
    with pytest.raises(ValueError, match=f"`{ENDS}` is missing"):
        old.generate(text["input_ids"], **GREEDY)
    wrong = inputs | {ENDS: inputs[ENDS] + 500}  # is still refused by the blocks
    with pytest.raises(ValueError, match=ENDS):
        old(**wrong)


ANSWER = """
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True, dtype="float32").eval()
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist())
del inputs["prompt_end_positions"], inputs["instruct_input_ids"], inputs["instruct_attention_mask"]
try:
    print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist())
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_folder_without_the_package(tmp_path: Path) -> None:
    """By its own code, with the fields and without them."""
    model, _ = make_chat_model("nano", tmp_path)
    new = Path(model.config._name_or_path)
    caches = [tmp_path / "new-cache", tmp_path / "old-cache"]
    for cache in caches:
        cache.mkdir()
    complete, found = run(ANSWER, new, cache=caches[0])
    assert found == complete
    old_complete, said = run(ANSWER, old_folder(model, tmp_path / "old"), cache=caches[1])
    assert old_complete == complete
    assert f"`{ENDS}` is missing" in said
