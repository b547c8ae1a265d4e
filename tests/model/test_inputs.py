"""Inputs that are less than a full prompt, and inputs that cannot be: the error names both counts."""

from typing import Any

import pytest
import torch
from tests.helpers.tiny import QUERY_LEN, Sample, make_inputs, tiny_config, tiny_model

from fusion_hf import FusionForConditionalGeneration, FusionModel

SAMPLES = [Sample([5], seed=1), Sample([4, 7], [3], seed=2)]


@pytest.fixture(scope="module")
def model() -> FusionForConditionalGeneration:
    return tiny_model(tiny_config())


@pytest.fixture
def inputs(model: FusionForConditionalGeneration) -> dict[str, Any]:
    return make_inputs(model.config, SAMPLES)


def test_losses(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= model.config.image_token_id, -100)
    outputs = model(**inputs, labels=labels)
    weight = model.config.mapping_loss_weight
    torch.testing.assert_close(outputs.loss, outputs.language_loss + weight * outputs.mapping_loss)
    assert 0 < outputs.mapping_loss < 4  # two cosine distances
    without = model(**inputs)
    assert without.loss is None and without.mapping_loss is None and without.language_loss is None
    torch.testing.assert_close(without.logits, outputs.logits)


def test_mapping_loss_without_a_valid_question(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    """The question's term is left out, the image's stays."""
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= model.config.image_token_id, -100)
    silent = inputs | {"instruct_input_ids": torch.zeros(2, 0, dtype=torch.long), "instruct_attention_mask": None}
    loss = model(**silent, labels=labels).mapping_loss
    assert loss.isfinite() and 0 < loss < 2


def test_id_zero_is_no_question_token(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    ids = inputs["instruct_input_ids"].clone()
    ids[:, 1] = 0
    masked = inputs["instruct_attention_mask"].clone()
    masked[:, 1] = 0
    claimed = model(**inputs | {"instruct_input_ids": ids}).logits
    torch.testing.assert_close(
        claimed, model(**inputs | {"instruct_input_ids": ids, "instruct_attention_mask": masked}).logits
    )


def test_blocks_beyond_the_given_turns_stay(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, SAMPLES[1:])
    fewer = inputs | {"prompt_end_positions": inputs["prompt_end_positions"][:, :1]}
    hidden = [model(**x, output_hidden_states=True).hidden_states for x in (inputs, fewer)]
    latent = (inputs["input_ids"] == model.config.latent_token_id)[0].nonzero().flatten()
    first, second = latent[:QUERY_LEN], latent[QUERY_LEN:]
    torch.testing.assert_close(hidden[0][1][0, first], hidden[1][1][0, first])
    assert not torch.allclose(hidden[0][1][0, second], hidden[1][1][0, second])


def test_a_cut_last_block(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, SAMPLES[1:])
    last = (inputs["input_ids"] == model.config.latent_token_id)[0].nonzero().flatten()[-1].item()
    cut = inputs | {
        "input_ids": inputs["input_ids"][:, :last],
        "attention_mask": inputs["attention_mask"][:, :last],
        "prompt_end_positions": inputs["prompt_end_positions"][:, :1],
    }
    full = model(**inputs | {"prompt_end_positions": cut["prompt_end_positions"]}).logits[:, :last]
    torch.testing.assert_close(model(**cut).logits, full, rtol=1e-4, atol=1e-4)


def test_base_model_and_embeddings(model: FusionForConditionalGeneration) -> None:
    assert isinstance(model.model, FusionModel)
    ids = torch.randint(3, 50, (2, 7))
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=embeds)


def change(inputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**inputs, **changes}


def ends(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_len": 9}, r"must have 9 tokens .`query_len`., got 4"),
        ({"query_len": 5}, r"query_len.*a perfect square.*got 5"),
        ({"pixel_values": None}, r"has 16 image tokens, but `pixel_values` is None"),
        ({"pixel_values": torch.zeros(1, 5, 3, 32, 32)}, r"\(2, 5, 3, 32, 32\).*2 samples.*got \(1, 5, 3, 32, 32\)"),
        ({"pixel_values": torch.zeros(2, 5, 3, 16, 16)}, r"\(2, 5, 3, 32, 32\).*2 samples.*got \(2, 5, 3, 16, 16\)"),
        ({"prompt_end_positions": ends([35])}, r"B = 2 samples, got \(1, 1\)"),
        ({"prompt_end_positions": ends([999], [34])}, r"must be at most \d+.* got 999.*`max_length`"),
        ({"prompt_end_positions": ends([3], [3])}, r"prompt_end_positions\[0\]` must be from .*got 3"),
        ({"prompt_end_positions": ends([33, 34], [34, 35])}, r"2 `prompt_end_positions` but 1 latent blocks"),
    ],
)
def test_counts_that_disagree(
    model: FusionForConditionalGeneration, inputs: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(**change(inputs, **changes))


def test_wrong_numbers_of_placeholders(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    ids = inputs["input_ids"].clone()
    first = (ids[0] == model.config.image_token_id).nonzero().flatten()[0]
    ids[0, first] = 5
    with pytest.raises(ValueError, match=r"must have 16 image tokens.*got 15"):
        model(**change(inputs, input_ids=ids))
    with pytest.raises(ValueError, match="image must come before the first latent block"):
        model(**change(inputs, input_ids=inputs["input_ids"].flip(1), prompt_end_positions=torch.zeros(2, 0).long()))


def test_a_cache_is_not_continued_with_new_turns(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, SAMPLES[:1])
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Pass the whole conversation"):
        model(**inputs, cache=cache)


def test_chunked_prefill_is_refused(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, SAMPLES[:1])
    with pytest.raises(ValueError, match="`prefill_chunk_size` must be None, got 16"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


def test_unsupported_backbone() -> None:
    with pytest.raises(ValueError, match=r"llama, mistral, phi3, qwen2, qwen3, smollm3, got 'gpt2'"):
        tiny_model(tiny_config("gpt2"))


@pytest.mark.parametrize("name", ["pixel_values", "prompt_end_positions"])
def test_what_needs_ids_is_refused_with_embeddings(
    model: FusionForConditionalGeneration, inputs: dict[str, Any], name: str
) -> None:
    """Silently, they would be ignored: no image, no samplers."""
    embeds = torch.zeros(*inputs["input_ids"].shape, model.config.text_config.hidden_size)
    with pytest.raises(ValueError, match=f"`{name}` must be None without `input_ids`"):
        model(inputs_embeds=embeds, **{name: inputs[name]})
    with pytest.raises(ValueError, match=f"`{name}` must be None without `input_ids`"):
        model.generate(inputs_embeds=embeds, **{name: inputs[name]}, max_new_tokens=2)
