"""`image_token_grid` of a call: as if the configuration had it, in every way of running the model."""

from typing import Any

import pytest
import torch
from tests.helpers.tiny import BACKBONES, QUERY_LEN, Sample, make_inputs, tiny_config, tiny_model

from fusion_hf import FusionForConditionalGeneration

SIDE, GRID = 4, 3  # patches of a tile per side, and a grid that does not divide it
SAMPLES = [Sample([5], seed=1), Sample([4, 7, 2], [3, 6], seed=2), Sample([6], image=False, seed=3)]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
ONE_PROMPT = ("prompt_lookup_num_tokens", "assistant_model")


@pytest.fixture(scope="module")
def model() -> FusionForConditionalGeneration:
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def reduced() -> FusionForConditionalGeneration:
    """The same weights; the grid is in the configuration."""
    return tiny_model(tiny_config(image_token_grid=GRID))


@pytest.fixture
def inputs(reduced: FusionForConditionalGeneration) -> dict[str, Any]:
    return make_inputs(reduced.config, SAMPLES, padding_side="left")


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_equals_a_model_that_is_configured_so(name: str) -> None:
    full = tiny_model(tiny_config(name))
    for grid in range(1, SIDE + 1):
        reduced = tiny_model(tiny_config(name, image_token_grid=grid))
        inputs = make_inputs(reduced.config, SAMPLES)
        output = full(**inputs, image_token_grid=grid)
        assert torch.equal(output.logits, reduced(**inputs).logits)
        assert output.image_hidden_states.shape[1] == grid**2
        # the other way round: the call overrules the configuration
        whole = make_inputs(full.config, SAMPLES)
        assert torch.equal(reduced(**whole, image_token_grid=SIDE).logits, full(**whole).logits)


@torch.no_grad()
def test_nothing_stays_behind_and_the_grid_matters(
    model: FusionForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    whole = make_inputs(model.config, SAMPLES)
    before = model(**whole).logits
    coarse = model(**inputs, image_token_grid=GRID).image_hidden_states
    assert torch.equal(model(**whole).logits, before)
    assert model.config.image_token_grid is None
    image = {name: inputs[name] for name in ("pixel_values", "instruct_input_ids", "instruct_attention_mask")}
    features = model.get_image_features(**image, image_token_grid=GRID).pooler_output
    torch.testing.assert_close(features, coarse)
    assert model.get_image_features(**image).pooler_output.shape[1] == SIDE**2


def test_losses_and_gradients_are_those_of_the_configuration(
    model: FusionForConditionalGeneration, reduced: FusionForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= model.config.image_token_id, -100)
    gradients = []
    for one, given in ((model, {"image_token_grid": GRID}), (reduced, {})):
        one.zero_grad()
        one(**inputs, **given, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in one.parameters() if p.grad is not None])
        one.zero_grad()
    assert len(gradients[0]) > 50
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": None},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_generation_equals_a_model_that_is_configured_so(
    model: FusionForConditionalGeneration, reduced: FusionForConditionalGeneration, options: dict[str, Any]
) -> None:
    single = any(name in options for name in ONE_PROMPT)
    inputs = make_inputs(reduced.config, SAMPLES[:1] if single else SAMPLES, padding_side="left")
    runs = []
    for one, given in ((model, {"image_token_grid": GRID}), (reduced, {})):
        helper = {"assistant_model": tiny_model(one.config, seed=1)} if "assistant_model" in options else {}
        torch.manual_seed(0)
        runs.append(one.generate(**inputs, **given, **(GREEDY | options | helper)))
    assert torch.equal(*runs)


def test_reused_features_and_continued_caches(
    model: FusionForConditionalGeneration, reduced: FusionForConditionalGeneration
) -> None:
    inputs = make_inputs(reduced.config, [Sample([5, 6, 3], [4, 2], seed=8)])
    expected = reduced.generate(**inputs, **GREEDY)
    with torch.no_grad():
        features = model.get_global_features(inputs["pixel_values"])
    given = {"global_features": features, "image_token_grid": GRID}
    assert torch.equal(model.generate(**inputs, **GREEDY, **given), expected)
    ends = inputs["prompt_end_positions"]
    cached = int(ends[0, 1]) + 2  # with the first token of an answer
    first = inputs | {
        "input_ids": inputs["input_ids"][:, :cached],
        "attention_mask": inputs["attention_mask"][:, :cached],
        "prompt_end_positions": ends[:, :2],
    }
    with torch.no_grad():
        cache = model(**first, image_token_grid=GRID, use_cache=True).past_key_values
    assert torch.equal(model.generate(**inputs, **GREEDY, **given, cache=cache), expected)


@pytest.mark.slow
@torch.no_grad()
def test_compiled(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    torch._dynamo.reset()  # else sizes that other tests in this process have compiled become unknowns here
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(**inputs, image_token_grid=GRID).logits
    torch.testing.assert_close(compiled(**inputs, image_token_grid=GRID).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [0, -1, SIDE + 1, 2.0, "2"])
def test_an_impossible_grid_is_named(model: FusionForConditionalGeneration, grid: Any) -> None:
    inputs = make_inputs(model.config, SAMPLES)
    message = rf"image_token_grid.*a whole number from 1 to {SIDE}.*got {grid!r}"
    with pytest.raises(ValueError, match=message):
        model(**inputs, image_token_grid=grid)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, image_token_grid=grid, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        model.get_image_features(inputs["pixel_values"], image_token_grid=grid)


def test_tokens_of_another_grid_are_refused_with_both_counts(
    model: FusionForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"must have 4 image tokens, as `image_token_grid` is 2, got 9"):
        model(**inputs, image_token_grid=2)
    with pytest.raises(ValueError, match=r"must have 16 image tokens, as `image_token_grid` is 4, got 9"):
        model(**inputs)
    whole = make_inputs(model.config, SAMPLES)
    with pytest.raises(ValueError, match=r"must have 9 image tokens, as `image_token_grid` is 3, got 16"):
        model.generate(**whole, image_token_grid=GRID, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"must have 9 tokens .`query_len`., got {QUERY_LEN}"):
        model(**inputs | {"query_len": 9}, image_token_grid=GRID)
