"""Turns and questions that the model finds in ids are those that the processor gives, in every chat format."""

from typing import Any

import pytest
import torch
from tests.helpers.chat_models import MODEL_PARAMETERS, TURNS, bare, chat, encode, make_chat_model

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.model.turns_fusion import SAMPLES, describe_turns, find_prompt_ends, find_questions

TEXTS = (
    *SAMPLES,
    "what color is the shape?",
    "Was ist das? Und warum?",
    "say <image>, <|end|>, <|im_end|> or <|eot_id|>",
    "two\n\nparagraphs\tand  spaces",
    "日本語の長い文章です。これは何ですか?",
)


@pytest.fixture(scope="module", params=MODEL_PARAMETERS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: Any
) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    return make_chat_model(request.param, tmp_path_factory.mktemp(request.param))


def test_questions_and_ends_are_the_processors(pair) -> None:
    model, processor = pair
    for text in TEXTS:
        for texts in ((text,), (text, "yes", "why?"), ("what?", text, f" {text}\n", "\nno", text)):
            inputs = encode(processor, chat(*texts))
            given = (inputs["input_ids"], inputs["attention_mask"], model.config)
            assert find_prompt_ends(*given).tolist() == inputs["prompt_end_positions"].tolist(), texts
            question, mask = find_questions(*given)
            assert question.tolist() == inputs["instruct_input_ids"].tolist(), texts
            assert mask.tolist() == inputs["instruct_attention_mask"].tolist(), texts


def test_only_phi3s_questions_depend_on_the_text_before_them(pair) -> None:
    model, processor = pair
    assert model.config.questions_are_cut is (processor.chat_format != "phi3")
    assert {name: getattr(model.config, name) for name in describe_turns(processor)} == describe_turns(processor)


@torch.no_grad()
def test_logits_from_ids_alone(pair) -> None:
    model, processor = pair
    processor.tokenizer.padding_side = "left"
    messages = [chat("what color is the shape?"), chat("is it red?", "yes", "what is it?"), chat("hello", image=None)]
    inputs = encode(processor, messages, processor_kwargs={"padding": True})
    torch.testing.assert_close(model(**bare(inputs)).logits, model(**inputs).logits)


def test_generation_from_ids_alone(pair) -> None:
    model, processor = pair
    options = {"max_new_tokens": 4, "do_sample": False}
    inputs = encode(processor, chat("what color is the sky?", image=None))
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(inputs["input_ids"], **options), expected)
    assert torch.equal(model.generate(inputs["input_ids"], **options, use_cache=False), expected)
    inputs = encode(processor, chat("what color is the shape?"))
    assert torch.equal(model.generate(**bare(inputs), **options), model.generate(**inputs, **options))


@torch.no_grad()
def test_rows_padded_one_by_one_and_joined_later(pair) -> None:
    """As `pipeline(..., batch_size=2)` does: ids padded on the left, everything else with 0 on the right."""
    model, processor = pair
    rows = [encode(processor, chat(*texts)) for texts in (("what?",), ("what color is the shape?", "red", "why?"))]
    joined = {name: pad([row[name] for row in rows], name in ("input_ids", "attention_mask")) for name in rows[0]}
    logits = model(**joined).logits
    for number, row in enumerate(rows):
        torch.testing.assert_close(logits[number, -1], model(**row).logits[0, -1], rtol=1e-4, atol=1e-4)


def pad(tensors: list[torch.Tensor], on_left: bool) -> torch.Tensor:
    longest = max(tensor.shape[1] for tensor in tensors)
    missing = [longest - tensor.shape[1] for tensor in tensors]
    padded = []
    for tensor, count in zip(tensors, missing, strict=True):
        zeros = tensor.new_zeros(1, count, *tensor.shape[2:])
        padded.append(torch.cat([zeros, tensor] if on_left else [tensor, zeros], dim=1))
    return torch.cat(padded)


@torch.no_grad()
def test_completions_appended_and_rows_flushed_left(pair) -> None:
    """As TRL does with prompts and completions: positions stay those of prompts padded on the left."""
    model, processor = pair
    prompts = [encode(processor, chat(text)) for text in ("what?", "what color is the shape on the left?")]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    moved, ids = [], []
    for prompt, answer in zip(prompts, ("red red red", "no"), strict=True):
        completion = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids.append(torch.cat([prompt["input_ids"], completion], 1))
        moved.append(prompt["prompt_end_positions"] + longest - prompt["input_ids"].shape[1])
    batch = {
        "input_ids": pad(ids, on_left=False),
        "attention_mask": pad([torch.ones_like(row) for row in ids], on_left=False),
        "pixel_values": torch.cat([prompt["pixel_values"] for prompt in prompts]),
        "prompt_end_positions": torch.cat(moved),
    }
    found = model(**batch).logits
    for number, (prompt, row) in enumerate(zip(prompts, ids, strict=True)):
        alone = model(**prompt | {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits
        torch.testing.assert_close(found[number, : row.shape[1]], alone[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padding", [-1, 0])
def test_padding_of_positions_may_be_on_the_left(pair, padding: int) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what?"))
    end = inputs["prompt_end_positions"].item()
    padded = inputs | {"prompt_end_positions": torch.tensor([[padding, end]])}
    torch.testing.assert_close(model(**padded).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        (lambda end: torch.tensor([[end + 3]]), "the ends of its assistant headers"),
        (lambda end: torch.tensor([[end - 1]]), "the ends of its assistant headers"),
        (lambda end: torch.tensor([end]), r"shape \(B, R\)"),
        (lambda end: torch.tensor([[end], [end]]), r"shape \(B, R\)"),
        (lambda end: torch.tensor([[float(end)]]), "tensor of integers"),
        (lambda end: [[end]], "tensor of integers"),
    ],
)
def test_wrong_positions_are_refused(pair, positions: Any, said: str) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what?", "red"), add_generation_prompt=False)
    end = inputs["prompt_end_positions"].item()
    with pytest.raises(ValueError, match=rf"`prompt_end_positions`.*{said}"):
        model(**inputs | {"prompt_end_positions": positions(end)})


@torch.no_grad()
def test_empty_tensors_ask_for_neither_samplers_nor_a_question(pair) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what color is the shape?"))
    nothing = inputs["input_ids"][:, :0]
    without = [
        model(**inputs | changes).logits
        for changes in (
            {"prompt_end_positions": nothing},
            {"instruct_input_ids": nothing, "instruct_attention_mask": nothing},
        )
    ]
    base = model(**inputs).logits
    assert all((logits - base).abs().max() > 1e-4 for logits in without)


def test_what_cannot_be_found_is_named(pair) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what?"))
    old = FusionForConditionalGeneration(replace_config(model.config)).eval()
    for name in TURNS[:2]:
        missing = {key: value for key, value in inputs.items() if key != name}
        with pytest.raises(ValueError, match=rf"`{name}` is missing.*\(B, 0\)"):
            old(**missing)
    unfinished = encode(processor, chat("what?"), add_generation_prompt=False)
    with pytest.raises(ValueError, match="no assistant header"):
        model(**bare(unfinished))


def replace_config(config: Any) -> Any:
    """The configuration of a folder from before the model could find turns."""
    values = config.to_dict()
    for name in ("assistant_header_ids", "turn_end_token_id"):
        values.pop(name)
    return type(config)(**values)


def test_placeholders_are_no_labels(pair) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what?", "red"), add_generation_prompt=False)
    ids = inputs["input_ids"]
    is_placeholder = (ids == model.config.image_token_id) | (ids == model.config.latent_token_id)
    found = model(**inputs, labels=ids.clone())
    expected = model(**inputs, labels=ids.masked_fill(is_placeholder, -100))
    assert found.loss == expected.loss and torch.isfinite(found.loss)


def test_placeholders_are_never_written(pair) -> None:
    model, processor = pair
    inputs = encode(processor, chat("what?"))
    grown = FusionForConditionalGeneration.from_pretrained(model.config._name_or_path).eval()
    rows = max(model.config.text_config.vocab_size, model.config.image_token_id + 1, model.config.latent_token_id + 1)
    grown.resize_token_embeddings(rows)
    with torch.no_grad():
        for placeholder in (model.config.image_token_id, model.config.latent_token_id):
            grown.lm_head.weight[placeholder] = grown.lm_head.weight.abs().max() * 100
    options = {"max_new_tokens": 8, "suppress_tokens": None, "eos_token_id": None}
    for sampled in (False, True):
        written = grown.generate(**inputs, **options, do_sample=sampled)[0, inputs["input_ids"].shape[1] :].tolist()
        assert not {model.config.image_token_id, model.config.latent_token_id} & set(written)
