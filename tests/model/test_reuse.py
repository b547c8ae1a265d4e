"""Features of the tiles computed once for many questions, and caches that further turns continue."""

from typing import Any

import pytest
import torch
from tests.helpers.tiny import BACKBONES, QUERY_LEN, Sample, make_inputs, tiny_config, tiny_model
from transformers import DynamicCache

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.inference.image_features import pool_map
from fusion_hf.model.modeling_fusion import LossCounts

SAMPLES = [Sample([5], seed=1), Sample([4, 7, 2], [3, 6], seed=2), Sample([6], image=False, seed=3)]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
TILES, SIDE = 4, 8  # a map of 8 x 8 features: four tiles of 4 x 4 patches


@pytest.fixture(scope="module")
def model() -> FusionForConditionalGeneration:
    return tiny_model(tiny_config())


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> FusionForConditionalGeneration:
    return tiny_model(tiny_config(request.param))


@pytest.fixture
def inputs(model: FusionForConditionalGeneration) -> dict[str, Any]:
    return make_inputs(model.config, SAMPLES, padding_side="left")


class TileCounter:
    """How many tiles each call of the tower encodes."""

    def __init__(self, model: FusionForConditionalGeneration):
        self.calls: list[int] = []
        self.handle = model.model.vision_tower.register_forward_pre_hook(self.count)

    def count(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.calls.append(len(args[0]))

    def __enter__(self) -> list[int]:
        return self.calls

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()


@torch.no_grad()
def test_features_of_the_tiles_alone_and_with_the_overview(
    model: FusionForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    pixel_values = inputs["pixel_values"]
    features = model.get_global_features(pixel_values)
    assert features.shape == (len(SAMPLES), model.config.text_config.hidden_size, SIDE, SIDE)
    assert torch.equal(model.get_global_features(pixel_values[:, :TILES]), features)
    with pytest.raises(ValueError, match=r"\(B, 5, 3, 32, 32\) or \(B, 4, 3.*got \(3, 3, 3, 32, 32\)"):
        model.get_global_features(pixel_values[:, :3])


@torch.no_grad()
def test_logits_of_pooled_features(backbone: FusionForConditionalGeneration) -> None:
    """What is kept of an image for a number of latent tokens is all that the model sees of it: to the bit."""
    model = backbone
    for query_len, side in ((4, 4), (9, 6), (16, 8)):
        inputs = make_inputs(model.config, SAMPLES, query_len, padding_side="left")
        features = model.get_global_features(inputs["pixel_values"])
        pooled = pool_map(features, query_len, model.config.window_size)
        assert pooled.shape[-1] == min(side, SIDE)
        assert torch.equal(model(**inputs, global_features=pooled).logits, model(**inputs).logits)
        answers = [model.generate(**inputs, **GREEDY, **given) for given in ({}, {"global_features": pooled})]
        assert torch.equal(*answers)
    with pytest.raises(ValueError, match=r"be pooled to 8 x 8 for a `query_len` of 16.*\(3, 32, 2, 2\)"):
        model(**inputs, global_features=features[..., :2, :2])


def test_images_are_encoded_one_by_one_where_nothing_is_trained(
    model: FusionForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    with TileCounter(model) as together:
        expected = model.get_global_features(inputs["pixel_values"])
    with TileCounter(model) as apart, torch.no_grad():
        features = model.get_global_features(inputs["pixel_values"])
    assert together == [len(SAMPLES) * TILES]
    assert apart == [TILES] * len(SAMPLES)
    torch.testing.assert_close(features, expected)


@torch.no_grad()
def test_logits_are_those_without_reuse(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    expected = model(**inputs).logits
    features = model.get_global_features(inputs["pixel_values"])
    overviews = inputs | {"pixel_values": inputs["pixel_values"][:, TILES:]}
    for given in (inputs, overviews):
        with TileCounter(model) as calls:
            assert torch.equal(model(**given, global_features=features).logits, expected)
        assert calls == [len(SAMPLES)]
    assert torch.equal(model(**inputs).logits, expected)  # nothing stays behind
    assert torch.equal(model(**inputs, global_features=features.double()).logits, expected)
    assert not torch.equal(model(**inputs, global_features=features.flip(0)).logits, expected)


def test_losses_and_gradients_are_those_without_reuse(
    model: FusionForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= model.config.image_token_id, -100)
    counts = LossCounts(*(torch.tensor(float(number)) for number in (50, 20, 3)))
    gradients = []
    for reuse in (False, True):
        model.zero_grad()
        given = {"global_features": model.get_global_features(inputs["pixel_values"])} if reuse else {}
        model(**inputs, **given, labels=labels, loss_counts=counts).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.model.vision_tower.layers.parameters()])
    model.zero_grad()
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}],
)
def test_generated_tokens_are_those_without_reuse(
    model: FusionForConditionalGeneration, options: dict[str, Any]
) -> None:
    samples = SAMPLES[:1] if "prompt_lookup_num_tokens" in options else SAMPLES
    inputs = make_inputs(model.config, samples, padding_side="left")
    expected = model.generate(**inputs, **GREEDY, **options)
    with torch.no_grad():
        features = model.get_global_features(inputs["pixel_values"])
    assert torch.equal(model.generate(**inputs, **GREEDY, **options, global_features=features), expected)


def test_sampled_sequences_share_features(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    options = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
    with torch.no_grad():
        features = model.get_global_features(inputs["pixel_values"])
    runs = []
    for given in ({}, {"global_features": features}):
        torch.manual_seed(0)
        runs.append(model.generate(**inputs, **options, **given))
    assert torch.equal(*runs)


@torch.no_grad()
def test_other_query_lengths_share_features(model: FusionForConditionalGeneration) -> None:
    """The map is pooled for each call, so that no query length is the wrong one."""
    features = model.get_global_features(make_inputs(model.config, SAMPLES)["pixel_values"])
    for query_len in (1, 9):
        inputs = make_inputs(model.config, SAMPLES, query_len)
        assert torch.equal(model(**inputs, global_features=features).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 32, 8, 8), r"shape \(3, 32, 8, 8\) for 3 samples.*got \(2, 32, 8, 8\)"),
        ((1, 32, 8, 8), r"\(3, 32, 8, 8\) for 3 samples.*got \(1, 32, 8, 8\)"),
        ((3, 64, 8, 8), r"\(3, 32, 8, 8\) for 3 samples.*got \(3, 64, 8, 8\)"),
        ((3, 32, 6, 6), r"\(3, 32, 8, 8\) for 3 samples.*got \(3, 32, 6, 6\)"),
        ((3, 32, 64), r"\(3, 32, 8, 8\) for 3 samples.*got \(3, 32, 64\)"),
    ],
)
def test_features_of_something_else_are_refused(
    model: FusionForConditionalGeneration, inputs: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(**inputs, global_features=torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, global_features=torch.zeros(shape), max_new_tokens=2)


def test_features_without_what_they_need_are_refused(
    model: FusionForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    features = torch.zeros(len(SAMPLES), 32, SIDE, SIDE)
    text = torch.randint(3, 50, (len(SAMPLES), 7))
    with pytest.raises(ValueError, match=r"floating-point tensor, got torch\.int64"):
        model(**inputs, global_features=features.long())
    with pytest.raises(ValueError, match=r"\(3, 5, 3, 32, 32\) or \(3, 1, 3, 32, 32\)"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:, :2]}, global_features=features)
    with pytest.raises(ValueError, match=r"\(3, 5, 3, 32, 32\) for 3 samples, got \(3, 1, 3, 32, 32\)"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:, TILES:]})
    with pytest.raises(ValueError, match="`global_features` need `pixel_values`"):
        model(**inputs | {"pixel_values": None}, global_features=features)
    with pytest.raises(ValueError, match="`global_features` need `pixel_values`"):
        model(input_ids=text, global_features=features)
    with pytest.raises(ValueError, match="`global_features` must be None without `input_ids`"):
        model(inputs_embeds=torch.zeros(len(SAMPLES), 7, 32), global_features=features)


def split(inputs: dict[str, Any], cached: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A conversation as its beginning, and as what is passed to continue its cache."""
    ends = inputs["prompt_end_positions"]
    first = inputs | {
        "input_ids": inputs["input_ids"][:, :cached],
        "attention_mask": inputs["attention_mask"][:, :cached],
        "prompt_end_positions": ends[ends < cached].view(len(ends), -1),
    }
    rest = {
        "input_ids": inputs["input_ids"][:, cached:],
        "attention_mask": inputs["attention_mask"],
        "prompt_end_positions": ends[ends >= cached].view(len(ends), -1) - cached,
        "query_len": inputs["query_len"],
    }
    return first, rest


CONVERSATION = Sample([5, 6, 3], [4, 2], seed=8)


@torch.no_grad()
@pytest.mark.parametrize("turns", [1, 2])
def test_turns_continue_a_cache(backbone: FusionForConditionalGeneration, turns: int) -> None:
    """Turn by turn, and two turns at once: the logits are those of one pass over the whole conversation."""
    inputs = make_inputs(backbone.config, [CONVERSATION])
    expected = backbone(**inputs).logits
    features = backbone.get_global_features(inputs["pixel_values"])
    cached = int(inputs["prompt_end_positions"][0, -turns - 1]) + 2  # with the first token of an answer
    first, rest = split(inputs, cached)
    cache = backbone(**first, use_cache=True).past_key_values
    with TileCounter(backbone) as calls:
        logits = backbone(**rest, cache=cache, global_features=features).logits
    assert calls == []
    torch.testing.assert_close(logits, expected[:, cached:], rtol=1e-4, atol=1e-4)
    cache = backbone(**first, use_cache=True).past_key_values
    other = backbone(**rest, cache=cache, global_features=features.flip(-1)).logits
    assert not torch.allclose(other, logits, rtol=1e-4, atol=1e-4)


def test_generation_continues_a_cache(backbone: FusionForConditionalGeneration) -> None:
    """`generate` takes the whole conversation beside the cache of its beginning; batches of unequal turns as well."""
    samples = [CONVERSATION, Sample([5, 4], [13], seed=9)]
    inputs = make_inputs(backbone.config, samples, padding_side="left")
    expected = backbone.generate(**inputs, **GREEDY)
    cached = inputs["input_ids"].shape[1] - 12  # behind two turns of the first, and behind one of the second
    ends = inputs["prompt_end_positions"]
    assert ((ends >= 0) & (ends < cached)).sum(1).tolist() == [2, 1]
    first = inputs | {
        "input_ids": inputs["input_ids"][:, :cached],
        "attention_mask": inputs["attention_mask"][:, :cached],
        "prompt_end_positions": ends.masked_fill(ends >= cached, -1),
    }
    with torch.no_grad():
        cache = backbone(**first, use_cache=True).past_key_values
        features = backbone.get_global_features(inputs["pixel_values"])
    with TileCounter(backbone) as calls:
        output = backbone.generate(**inputs, **GREEDY, cache=cache, global_features=features)
    assert calls == []
    assert torch.equal(output, expected)


@torch.no_grad()
def test_what_cannot_continue_a_cache_is_refused(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, [CONVERSATION])
    features = model.get_global_features(inputs["pixel_values"])
    cached = int(inputs["prompt_end_positions"][0, 1]) + 2
    first, rest = split(inputs, cached)
    cache = model(**first, use_cache=True).past_key_values
    given = rest | {"cache": cache, "global_features": features}
    with pytest.raises(ValueError, match="or pass `global_features` of the image without `pixel_values`"):
        model(**given | {"global_features": None})
    with pytest.raises(ValueError, match=r"instruct_input_ids. must be None"):
        model(**given, instruct_input_ids=inputs["instruct_input_ids"])
    with pytest.raises(ValueError, match="`global_features` need `pixel_values`"):
        model(**given | {"prompt_end_positions": inputs["prompt_end_positions"][:, :0]})
    with pytest.raises(ValueError, match="`global_features` need `pixel_values`"):
        model(**given | {"cache": DynamicCache()})
    with pytest.raises(ValueError, match=f"must have 9 tokens .`query_len`., got {QUERY_LEN}"):
        model(**given | {"query_len": 9})
    with pytest.raises(ValueError, match=r"\(1, 32, 8, 8\) for 1 samples.*got \(1, 32, 6, 6\)"):
        model(**given | {"global_features": torch.zeros(1, 32, 6, 6)})
    with pytest.raises(ValueError, match="`pixel_values` is None"):
        model(**given | {"input_ids": inputs["input_ids"], "prompt_end_positions": inputs["prompt_end_positions"]})
    assert cache.get_seq_length() == cached


def test_a_conversation_without_image_does_not_continue_a_cache(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, [Sample([5, 6], [4], image=False, seed=8)])
    features = torch.zeros(1, 32, SIDE, SIDE)
    with torch.no_grad():
        first, _ = split(inputs, int(inputs["prompt_end_positions"][0, 0]) + 2)
        cache = model(**first, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Sample 0 has no image"):
        model.generate(**inputs, cache=cache, global_features=features, max_new_tokens=2)


def test_long_rope_makes_a_continued_cache_anew() -> None:
    """Phi-3's keys change when a conversation outgrows the short positions: its beginning is computed again."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    inputs = make_inputs(tiny_config(), [CONVERSATION])
    length = inputs["input_ids"].shape[1]
    text = {"original_max_position_embeddings": length - 2, "rope_parameters": rope}
    model = tiny_model(tiny_config("phi3", text=text))
    expected = model.generate(**inputs, **GREEDY)
    first, _ = split(inputs, int(inputs["prompt_end_positions"][0, 1]) + 2)
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        features = model.get_global_features(inputs["pixel_values"])
    given = {"cache": cache, "global_features": features, "return_dict_in_generate": True}
    output = model.generate(**inputs, **GREEDY, **given)
    assert torch.equal(output.sequences, expected)
    assert output.past_key_values is not cache
    assert output.past_key_values.get_seq_length() == expected.shape[1] - 1


@pytest.mark.slow  # test_compilation.py has a shorter one
@torch.no_grad()
def test_compiled_with_features(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, SAMPLES)
    features = model.get_global_features(inputs["pixel_values"])
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, global_features=features).logits, expected, rtol=1e-4, atol=1e-4)
