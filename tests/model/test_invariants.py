"""What must not change the numbers: padding, batching, caches, compilation, checkpointing, attention kernels."""

from typing import Any

import pytest
import torch
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.training.gradient_checkpointing import enable_checkpointing

SAMPLES = [
    Sample([5], seed=1),
    Sample([4, 7, 2], [3, 6], seed=2),
    Sample([6], image=False, seed=3),
    Sample([2, 3], [9], image=False, seed=4),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=BACKBONES)
def model(request: pytest.FixtureRequest) -> FusionForConditionalGeneration:
    return tiny_model(tiny_config(request.param))


@pytest.fixture
def llama() -> FusionForConditionalGeneration:
    return tiny_model(tiny_config())


def attended(outputs: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [row[mask.bool()] for row, mask in zip(outputs.logits, inputs["attention_mask"], strict=True)]


@torch.no_grad()
def test_left_padding_equals_right_padding_equals_one_by_one(model: FusionForConditionalGeneration) -> None:
    batches = {side: make_inputs(model.config, SAMPLES, padding_side=side) for side in ("left", "right")}
    results = {side: attended(model(**batch), batch) for side, batch in batches.items()}
    for index, sample in enumerate(SAMPLES):
        alone = make_inputs(model.config, [sample])
        expected = model(**alone).logits[0]
        for side in batches:
            torch.testing.assert_close(results[side][index], expected, **CLOSE)


@torch.no_grad()
def test_every_part_reaches_the_logits(model: FusionForConditionalGeneration) -> None:
    """Without this, the other tests could pass on a model that ignores its image or its question."""
    inputs = make_inputs(model.config, SAMPLES[:2])
    base = model(**inputs).logits
    changes = {
        "overview": {"pixel_values": inputs["pixel_values"] * torch.tensor([1.0, 1, 1, 1, -1]).view(1, 5, 1, 1, 1)},
        "tiles": {"pixel_values": inputs["pixel_values"] * torch.tensor([-1.0, -1, -1, -1, 1]).view(1, 5, 1, 1, 1)},
        "question": {"instruct_input_ids": inputs["instruct_input_ids"].flip(1)},
        "samplers": {"prompt_end_positions": inputs["prompt_end_positions"][:, :0]},
    }
    for name, change in changes.items():
        assert (model(**inputs | change).logits - base).abs().max() > 1e-3, name


@torch.no_grad()
@pytest.mark.parametrize("early", ["uniform", "uniform_padded", "masked"])
def test_early_text_attention(early: str) -> None:
    """Padded question tokens change nothing, but in `uniform_padded`; the three ways differ from each other."""
    model = tiny_model(tiny_config(early_text_attention=early))
    inputs = make_inputs(model.config, SAMPLES[:1])
    base = model(**inputs).logits
    padded = dict(inputs)
    for name in ("instruct_input_ids", "instruct_attention_mask"):
        padded[name] = torch.nn.functional.pad(inputs[name], (0, 7))
    same = torch.allclose(model(**padded).logits, base, **CLOSE)
    assert same == (early != "uniform_padded")
    others = {"uniform", "masked"} - {early}
    for other in others:
        model.config.early_text_attention = other
        different = not torch.allclose(model(**inputs).logits, base, **CLOSE)
        # without padding the two uniform ways are one
        assert different == (other == "masked" or early == "masked")


@torch.no_grad()
def test_masked_patches_do_not_see_the_question_early() -> None:
    config = tiny_config()
    tower = tiny_model(config).model.vision_tower
    pixels, width = torch.randn(2, 3, 32, 32), config.vision_config.hidden_size
    text, mask = torch.randn(2, 3, width), torch.ones(2, 3, dtype=torch.bool)
    early_mean = slice(width, 2 * width)  # of the early hidden states
    alone = tower(pixels).features[..., early_mean]
    for early, sees in (("masked", False), ("uniform", True)):
        features = tower(pixels, text, mask, early_text_attention=early).features[:, : alone.shape[1], early_mean]
        assert ((features - alone).abs().max() > 1e-4) == sees
    with pytest.raises(ValueError, match=r"early_text_attention.*'uniform'.*got 'other'"):
        tower(pixels, text, mask, early_text_attention="other")


@torch.no_grad()
def test_forward_after_generate_is_unchanged(llama: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(llama.config, SAMPLES[:2])
    before = llama(**inputs).logits
    llama.generate(**make_inputs(llama.config, SAMPLES[2:], padding_side="left"), **GREEDY)
    torch.testing.assert_close(llama(**inputs).logits, before, rtol=0, atol=0)


def test_static_dynamic_and_no_cache_agree(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, SAMPLES, padding_side="left")
    expected = model.generate(**inputs, **GREEDY)
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in (static, {"use_cache": False}):
        torch.testing.assert_close(model.generate(**inputs, **GREEDY, **options), expected)


def test_batch_generation_equals_single(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, SAMPLES, padding_side="left")
    batch = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for index, sample in enumerate(SAMPLES):
        alone = make_inputs(model.config, [sample])
        single = model.generate(**alone, **GREEDY)[:, alone["input_ids"].shape[1] :]
        torch.testing.assert_close(batch[index : index + 1], single)


def test_beam_search_batch_equals_single(llama: FusionForConditionalGeneration) -> None:
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    inputs = make_inputs(llama.config, SAMPLES, padding_side="left")
    batch = llama.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for index, sample in enumerate(SAMPLES):
        alone = make_inputs(llama.config, [sample])
        single = llama.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        torch.testing.assert_close(batch[2 * index : 2 * index + 2], single)


def test_beams_share_the_tiles_of_their_image(llama: FusionForConditionalGeneration) -> None:
    """Overviews are encoded with each beam, four tiles only once."""
    seen = []
    llama.model.vision_tower.embeddings.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    inputs = make_inputs(llama.config, SAMPLES[:2], padding_side="left")
    llama.generate(**inputs, **GREEDY, num_beams=3)
    assert sorted(seen) == [4, 4, 2 * 3]


@torch.no_grad()
def test_grey_is_encoded_once(llama: FusionForConditionalGeneration) -> None:
    """A batch without images sees what a batch of grey images sees, by one tile instead of five a sample."""
    seen = []
    llama.model.vision_tower.embeddings.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    inputs = make_inputs(llama.config, SAMPLES[2:])
    pixel_values = inputs.pop("pixel_values", torch.zeros(2, 5, 3, 32, 32))
    expected = llama(**inputs, pixel_values=pixel_values).logits
    seen.clear()
    torch.testing.assert_close(llama(**inputs).logits, expected, **CLOSE)
    assert seen == [1]


def test_assisted_and_prompt_lookup_decoding_equal_greedy(llama: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(llama.config, SAMPLES[1:2])
    expected = llama.generate(**inputs, **GREEDY)
    assistant = tiny_model(tiny_config(), seed=7)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        torch.testing.assert_close(llama.generate(**inputs, **GREEDY, **options), expected)


def test_sampling_repeats_with_a_seed(llama: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(llama.config, SAMPLES, padding_side="left")
    options = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None, "temperature": 1.5}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(llama.generate(**inputs, **options))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_logits_processors_that_index_by_id(llama: FusionForConditionalGeneration) -> None:
    """Image and latent ids lie behind the vocabulary: penalties must not look them up in the logits."""
    inputs = make_inputs(llama.config, SAMPLES, padding_side="left")
    output = llama.generate(**inputs, **GREEDY, repetition_penalty=1.3, no_repeat_ngram_size=2)
    assert output.shape[1] == inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(llama: FusionForConditionalGeneration, implementation: str) -> None:
    inputs = make_inputs(llama.config, SAMPLES)
    expected = attended(llama(**inputs), inputs)
    llama.set_attn_implementation(implementation)
    assert llama.model.vision_tower.config._attn_implementation == implementation
    for ours, reference in zip(attended(llama(**inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, reference, **CLOSE)


@torch.no_grad()
def test_compiled_without_graph_breaks(llama: FusionForConditionalGeneration) -> None:
    """Prefill with samplers as one graph; the ahead-of-time backend traces what inductor would compile."""
    inputs = make_inputs(llama.config, SAMPLES)
    expected = llama(**inputs).logits
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, **CLOSE)


@pytest.mark.slow
def test_inductor_equals_eager(llama: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(llama.config, SAMPLES, padding_side="left")
    with torch.no_grad():
        expected = llama(**inputs).logits
        compiled = torch.compile(llama, fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, expected, **CLOSE)
    torch._dynamo.reset()
    greedy = llama.generate(**inputs, **GREEDY)
    torch.testing.assert_close(llama.generate(**inputs, **GREEDY, cache_implementation="static"), greedy)


def test_gradient_checkpointing_changes_no_gradient(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, SAMPLES)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= model.config.image_token_id, -100)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            enable_checkpointing(model)
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_equal_one_batch(llama: FusionForConditionalGeneration) -> None:
    """Two equal halves: the mean of their losses is the batch's loss, mapping losses included."""
    samples = [Sample([5], [4], seed=i) for i in range(4)]
    losses, gradients = [], []
    for groups in ([samples], [samples[:2], samples[2:]]):
        llama.zero_grad()
        total = 0.0
        for group in groups:
            inputs = make_inputs(llama.config, group)
            labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= llama.config.image_token_id, -100)
            loss = llama(**inputs, labels=labels).loss / len(groups)
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append(llama.lm_head.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: FusionForConditionalGeneration, dtype: torch.dtype) -> None:
    inputs = make_inputs(model.config, SAMPLES)
    expected = attended(model(**inputs), inputs)
    half = model.to(dtype)
    half.generate(**make_inputs(model.config, SAMPLES, padding_side="left"), **GREEDY)
    for ours, reference in zip(attended(half(**inputs), inputs), expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.float() - reference).norm() / reference.norm()
        assert error < 0.1, error


def test_long_rope_switch_while_decoding() -> None:
    """Phi-3 changes its frequencies past the original length: the prompt, image included, is read again."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "rope_theta": 10000.0}
    samples = [Sample([6], seed=5)]
    length = make_inputs(tiny_config(), samples)["input_ids"].shape[1]
    text = {"rope_parameters": factors, "original_max_position_embeddings": length + 3}
    model = tiny_model(tiny_config("phi3", text=text))
    inputs = make_inputs(model.config, samples)
    expected = model.generate(**inputs, **GREEDY, use_cache=False)
    torch.testing.assert_close(model.generate(**inputs, **GREEDY), expected)


@torch.no_grad()
def test_reduced_grid_uses_the_same_weights(llama: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(llama.config, SAMPLES[:1])
    full = llama.get_image_features(inputs["pixel_values"], inputs["instruct_input_ids"])
    assert full.pooler_output.shape == (1, 16, 32)
    llama.config.image_token_grid = 2
    reduced = llama.get_image_features(inputs["pixel_values"], inputs["instruct_input_ids"]).pooler_output
    torch.testing.assert_close(reduced, full.pooler_output.view(1, 2, 2, 2, 2, 32).mean(dim=(2, 4)).view(1, 4, 32))
    smaller = make_inputs(llama.config, SAMPLES[:1])
    assert llama(**smaller).logits.isfinite().all()
