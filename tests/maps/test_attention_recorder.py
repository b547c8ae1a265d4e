"""The rows that are read are those of the whole attention, whatever computes it, and nothing is left behind."""

import threading
from collections.abc import Callable
from functools import partial
from itertools import product
from math import isqrt
from typing import Any

import pytest
import torch
from memory import peak_allocated
from tests.helpers.flash import FlashStandIn
from tests.helpers.tiny import BACKBONES, QUERY_LEN, Sample, make_inputs, tiny_config, tiny_model
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.maps.attention_recorder import AttentionRecorder, RecordedRows, lay_out, mean_rows, split_layers
from fusion_hf.model.modeling_fusion_decoder import FusionSampler, LatentUpdates
from fusion_hf.model.modeling_fusion_vision import adaptive_max_pool, pool_context

GROUPS = 2
NEW_TOKENS = 5
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
CLOSE = {"rtol": 0, "atol": 1e-5}
IMPLEMENTATIONS = ("eager", "sdpa")
TALK = Sample([5, 4], [3], seed=2)


def recorder_of(
    model: FusionForConditionalGeneration, inputs: dict[str, Any], groups: int = GROUPS
) -> AttentionRecorder:
    return AttentionRecorder(model, inputs["input_ids"], groups)


def read(
    model: FusionForConditionalGeneration, inputs: dict[str, Any], groups: int = GROUPS, **options: Any
) -> tuple[torch.Tensor, RecordedRows]:
    """The generated ids and what was read."""
    with recorder_of(model, inputs, groups) as recorder:
        ids = model.generate(**inputs, **(GREEDY | options))
    return ids, recorder.rows()


def expected_question(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    """`(layers, T, N)` from the weights of eager attention."""
    names = ("pixel_values", "instruct_input_ids", "instruct_attention_mask")
    output = model.get_image_features(*(inputs[name] for name in names), output_attentions=True)
    patches = model.config.num_patches_per_side**2
    return torch.stack([weights[0].mean(0)[patches:, :patches] for weights in output.attentions])


def expected_answer(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    """`(layers, A, g * g)` from the weights of eager attention."""
    output = model.generate(**inputs, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    prompt = inputs["input_ids"].shape[1]
    rows = []
    for step, layers in enumerate(output.attentions):
        whole = torch.zeros(len(layers), prompt + step)
        for layer, weights in enumerate(layers):  # a sliding window's cache holds the last keys only
            last = weights[0].mean(0)[-1]
            whole[layer, prompt + step - len(last) :] = last
        rows.append(whole[:, places])
    return torch.stack(rows, dim=1)


def grouped(layers: torch.Tensor, ranges: tuple[range, ...]) -> torch.Tensor:
    """Means over groups of layers, as maps `(G, rows, side, side)`."""
    side = isqrt(layers.shape[-1])
    means = torch.stack([layers[group.start : group.stop].mean(0) for group in ranges])
    return means.unflatten(-1, (side, side))


def check_rows(model: FusionForConditionalGeneration, inputs: dict[str, Any], implementations: Any) -> None:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        question, answer = expected_question(model, inputs), expected_answer(model, inputs)
    plain = model.generate(**inputs, **GREEDY)
    for name in implementations:
        model.set_attn_implementation(name)
        recorder = recorder_of(model, inputs)
        ids, rows = read(model, inputs)
        torch.testing.assert_close(rows.question, grouped(question, recorder.tower_groups), **CLOSE)
        torch.testing.assert_close(rows.answer, grouped(answer, recorder.language_groups), **CLOSE)
        assert torch.equal(ids, plain), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rows_are_those_of_eager_attention(backbone: str):
    config = tiny_config(backbone)
    check_rows(tiny_model(config), make_inputs(config, [TALK]), IMPLEMENTATIONS)


@pytest.mark.slow  # flex attention compiles itself
def test_rows_with_flex_attention():
    config = tiny_config()
    check_rows(tiny_model(config), make_inputs(config, [TALK]), ["flex_attention"])


@pytest.mark.parametrize("window", [None, 3])
def test_rows_under_a_mask_of_flex_attention(window: int | None):
    """The mask alone: flex attention's kernels for a CPU do not compile under every one."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 7, 8, generator=generator) for heads in (4, 2))
    valid = torch.tensor([[0, 1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    mask = create_block_mask(
        lambda batch, head, row, column: (column <= row) & valid[batch, column], 1, None, 7, 7, device="cpu"
    )
    rows = mean_rows(query, key, mask, None, window, slice(-2, None))
    scores = query[0, :, -2:] @ key[0].repeat_interleave(2, 0).transpose(1, 2) / 8**0.5  # (4, 2, 7)
    for row, end in enumerate((5, 6)):
        allowed = [place for place in range(end + 1) if valid[0, place] and (window is None or end - place < window)]
        expected = torch.zeros(7)
        expected[allowed] = scores[:, row, allowed].softmax(-1).mean(0)
        torch.testing.assert_close(rows[row], expected, **CLOSE)


def test_rows_with_flash_attention(monkeypatch: pytest.MonkeyPatch):
    stand_in = FlashStandIn(dtypes=(torch.float32,))
    name = stand_in.install(monkeypatch)
    config = tiny_config()
    check_rows(tiny_model(config), make_inputs(config, [TALK]), [name])
    assert stand_in.whole


@pytest.mark.parametrize("backbone", ["mistral", "phi3"])
@pytest.mark.parametrize("window", [8, 20, 40])
def test_rows_with_a_sliding_window(backbone: str, window: int, monkeypatch: pytest.MonkeyPatch):
    name = FlashStandIn(dtypes=(torch.float32,)).install(monkeypatch)
    config = tiny_config(backbone, text={"sliding_window": window})
    inputs = make_inputs(config, [Sample([5], seed=3)])
    assert inputs["input_ids"].shape[1] > 20
    check_rows(tiny_model(config), inputs, [*IMPLEMENTATIONS, name])


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "flash"])
def test_padding_of_the_question_is_not_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    stand_in = FlashStandIn(dtypes=(torch.float32,)).install(monkeypatch)
    config = tiny_config()
    inputs = make_inputs(config, [TALK])
    inputs["instruct_input_ids"][0, -2] = config.instruct_pad_token_id  # a word that the tower does not read
    model = tiny_model(config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = expected_question(model, inputs)
    recorder = recorder_of(model, inputs)
    model.set_attn_implementation(stand_in if name == "flash" else name)
    _, rows = read(model, inputs)
    expected = grouped(expected, recorder.tower_groups)
    valid = inputs["instruct_input_ids"][0] != config.instruct_pad_token_id
    torch.testing.assert_close(rows.question[:, valid], expected[:, valid], **CLOSE)


def test_both_parts_may_have_their_own_implementation():
    config = tiny_config()
    model, inputs = tiny_model(config), make_inputs(config, [TALK])
    _, expected = read(model, inputs)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    _, rows = read(model, inputs)
    for name, values in expected._asdict().items():
        torch.testing.assert_close(getattr(rows, name), values, **CLOSE)


@pytest.mark.parametrize("early", ["uniform", "uniform_padded", "masked"])
def test_early_layers_are_read_unless_they_are_uniform(early: str):
    config = tiny_config(early_text_attention=early)
    model, inputs = tiny_model(config), make_inputs(config, [TALK])
    recorder = recorder_of(model, inputs)
    layers = [layer for group in recorder.tower_groups for layer in group]
    assert layers == (list(range(4)) if early == "masked" else [2, 3])
    check_rows(model, inputs, IMPLEMENTATIONS)


def test_long_rope_reads_the_prompt_again():
    """Where Phi-3's long RoPE begins, the whole sequence is computed anew: still one row per token."""
    length = make_inputs(tiny_config("phi3"), [TALK])["input_ids"].shape[1]
    factors = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    limit = length + 2
    text = {"rope_parameters": factors, "original_max_position_embeddings": limit, "max_position_embeddings": 512}
    config = tiny_config("phi3", text=text)
    check_rows(tiny_model(config), make_inputs(config, [TALK]), IMPLEMENTATIONS)


def window_weights(sampler: FusionSampler, hidden: torch.Tensor, updates: LatentUpdates) -> torch.Tensor:
    """`(R, q, w * w)`, one latent token and one head at a time."""
    heads, width = sampler.num_heads, hidden.shape[-1] // sampler.num_heads
    turns, latents = updates.latent_positions.shape[1:]
    weights = torch.zeros(turns, latents, updates.windows.shape[2])
    for turn, latent in product(range(turns), range(latents)):
        question = hidden[0, updates.prompt_end_positions[0, turn]]
        token = hidden[0, updates.latent_positions[0, turn, latent]]
        query = sampler.q_proj(sampler.q_norm(sampler.proj_in(torch.cat([question, token]))))
        keys = sampler.k_proj(sampler.k_norm(sampler.proj_context(updates.windows[0, latent])))
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            weights[turn, latent] += (keys[:, part] @ query[part] / width**0.5).softmax(0) / heads
    return weights


def test_windows_of_latent_tokens():
    config = tiny_config()
    model, inputs = tiny_model(config), make_inputs(config, [TALK])
    calls: list[tuple[FusionSampler, torch.Tensor, LatentUpdates]] = []
    for layer in config.sampler_layers:
        sampler = model.model.language_model.layers[layer].vision_sampler
        sampler.register_forward_pre_hook(lambda module, args: calls.append((module, *args)))
    _, rows = read(model, inputs)
    with torch.no_grad():
        seen = [window_weights(*call) for call in calls]
    side, window = isqrt(QUERY_LEN), config.window_size
    assert rows.latents.shape == (2, 2, side * window, side * window)
    for layer, turn, latent, place in product(range(2), range(2), range(QUERY_LEN), range(window**2)):
        row = latent // side * window + place // window
        column = latent % side * window + place % window
        value = rows.latents[layer, turn, row, column]
        assert value == pytest.approx(float(seen[layer][turn, latent, place]), abs=1e-5)


def test_windows_are_put_where_they_were_taken():
    """The order in which windows are laid out is that in which the model cuts them out of the image's features."""
    features = torch.arange(144.0).view(1, 1, 12, 12)
    _, windows = pool_context(features, 9, 2)  # (1, 9, 4, 1)
    assert torch.equal(lay_out(windows[..., 0], 2), adaptive_max_pool(features, 6)[0])


def state_of(model: FusionForConditionalGeneration) -> list[Any]:
    modules = list(model.modules())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    names = [set(vars(module)) for module in modules]
    return [
        hooks,
        names,
        model.config.to_dict(),
        dict(ALL_ATTENTION_FUNCTIONS),
        {**ALL_ATTENTION_FUNCTIONS._local_mapping},
    ]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_nothing_is_left_behind(name: str):
    config = tiny_config()
    model, inputs = tiny_model(config), make_inputs(config, [TALK])
    model.set_attn_implementation(name)
    model.generate(**inputs, **GREEDY)
    before = state_of(model)
    read(model, inputs)
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="stop"), recorder_of(model, inputs):
        raise RuntimeError("stop")
    assert state_of(model) == before


def test_a_function_of_the_callers_own_is_put_back(monkeypatch: pytest.MonkeyPatch):
    """One that somebody has put before transformers' own, as taps inside taps do."""
    config = tiny_config()
    model, inputs = tiny_model(config), make_inputs(config, [TALK])
    calls = []
    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return theirs(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", counted)
    with recorder_of(model, inputs) as outer:
        _, inner = read(model, inputs)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counted and calls
    for mine, other in zip(outer.rows(), inner, strict=True):
        assert torch.equal(mine, other)


def test_other_threads_are_neither_read_nor_changed():
    config = tiny_config()
    model = tiny_model(config)
    inputs, others = make_inputs(config, [TALK]), make_inputs(config, [Sample([6], seed=9)])
    expected_ids, expected = read(model, inputs)
    plain = model.generate(**others, **GREEDY)
    results: list[torch.Tensor] = []
    with recorder_of(model, inputs) as recorder:
        thread = threading.Thread(target=lambda: results.append(model.generate(**others, **GREEDY)))
        thread.start()
        thread.join()
        ids = model.generate(**inputs, **GREEDY)
    assert torch.equal(results[0], plain) and torch.equal(ids, expected_ids)
    for mine, other in zip(recorder.rows(), expected, strict=True):
        assert torch.equal(mine, other)


def test_taps_of_two_threads_do_not_mix():
    config = tiny_config()
    model = tiny_model(config)
    prompts = [make_inputs(config, [Sample([5], seed=seed)]) for seed in range(2)]
    expected = [read(model, inputs)[1] for inputs in prompts]
    rows: dict[int, RecordedRows] = {}

    def work(index: int) -> None:
        for _ in range(3):
            rows[index] = read(model, prompts[index])[1]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, values in enumerate(expected):
        for mine, other in zip(rows[index], values, strict=True):
            assert torch.equal(mine, other)


def test_a_model_without_samplers():
    config = tiny_config(sampler_layers=[])
    _, rows = read(tiny_model(config), make_inputs(config, [TALK]))
    assert len(rows.latents) == 0 and rows.answer.shape[1] == NEW_TOKENS


def test_fewer_image_tokens():
    config = tiny_config()
    reduced = tiny_config(image_token_grid=2)
    inputs = make_inputs(reduced, [TALK])
    _, rows = read(tiny_model(config), inputs, image_token_grid=2)
    assert rows.answer.shape == (GROUPS, NEW_TOKENS, 2, 2)
    assert rows.question.shape[2:] == (config.num_patches_per_side, config.num_patches_per_side)


@pytest.mark.parametrize(
    ("layers", "groups", "expected"),
    [
        (range(4), 2, ((0, 2), (2, 4))),
        (range(3, 6), 4, ((3, 4), (4, 5), (5, 6))),
        (range(5), 3, ((0, 1), (1, 3), (3, 5))),
        (range(7), 1, ((0, 7),)),
    ],
)
def test_layers_are_split(layers: range, groups: int, expected: tuple[tuple[int, int], ...]):
    assert split_layers(layers, groups) == tuple(range(*bounds) for bounds in expected)


def peak(function: Callable[[], Any]) -> int:
    return peak_allocated(function, torch.device("cpu"))


def test_memory_does_not_grow_with_layers():
    """Ten layers more cost `output_attentions` ten layers' weights, and the tap not one of them."""
    few, many = 4, 14
    growth: dict[str, list[int]] = {"plain": [], "tap": [], "stored": []}
    for layers in (few, many):
        config = tiny_config(text={"num_hidden_layers": layers})
        model, inputs = tiny_model(config), make_inputs(config, [Sample([150], seed=1)])
        model.set_attn_implementation("eager")
        options = GREEDY | {"max_new_tokens": 2}
        stored = {"output_attentions": True, "return_dict_in_generate": True}
        growth["plain"].append(peak(partial(model.generate, **inputs, **options)))
        growth["tap"].append(peak(partial(read, model, inputs, **options)))
        growth["stored"].append(peak(partial(model.generate, **inputs, **options, **stored)))
    plain, recorder, stored = (most - least for least, most in growth.values())
    length, heads = inputs["input_ids"].shape[1], config.text_config.num_attention_heads
    one_layer = 4 * heads * length**2  # bytes of its weights
    assert stored - plain > (many - few - 1) * one_layer
    assert recorder - plain < one_layer / 10
