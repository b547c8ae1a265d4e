"""The peers read as many image tokens as they say, and are FUSION's language model with another image before it."""

import pytest
import torch
from contestants import (
    AHEAD,
    COMPILED,
    LLAVA,
    LLAVA_TILED,
    NAMES,
    OURS,
    PEERS,
    SMOLVLM,
    build_contestants,
    cache_bytes,
    compiled_options,
    default_names,
    missing_originals,
    prefill_flops,
    weight_bytes,
)
from measure import clocked
from peers import llava_onevision_tokens, smolvlm_tokens
from workload import ONE_QUESTION, SIZES, Request, build_config, build_model

CPU, SIZE = torch.device("cpu"), SIZES["tiny"]
TWO_TURNS = Request(batch=2, question_tokens=7, turns=2)
PLAIN = [name for name in NAMES if name not in COMPILED]


@pytest.fixture(scope="module")
def ours():
    return build_model(SIZE, torch.float32, CPU)


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(1, 5, 3, SIZE.image_side, SIZE.image_side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def contestants(ours, pixel_values):
    return build_contestants(NAMES, ours, pixel_values, SIZE.new_tokens)


@pytest.mark.parametrize("asked", [ONE_QUESTION, TWO_TURNS], ids=["one question", "two turns of two rows"])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_prompts_hold_as_many_image_tokens_as_the_image_has(contestants, name, asked):
    contestant = contestants[name]
    prompt = contestant.prompt(asked)
    given = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
    features = contestant.model.model.get_image_features(**given, return_dict=True).pooler_output
    # older releases of transformers return SmolVLM's features of each tile apart
    assert sum(map(len, features)) == contestant.picture_tokens * asked.batch
    marks = prompt["input_ids"] == contestant.model.config.image_token_id
    assert marks.sum(1).tolist() == [contestant.picture_tokens] * asked.batch
    assert len(prompt["pixel_values"][0]) == contestant.tiles


def test_tokens_of_the_real_sizes():
    for name in ("middle", "3b", "8b"):
        config = build_config(SIZES[name])
        assert llava_onevision_tokens(config, tiled=False) == 27 * 27 + 1
        assert llava_onevision_tokens(config, tiled=True) == 27 * 27 + 54 * 55
        assert smolvlm_tokens(config) == 5 * 81


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_peers_have_our_language_model_and_tower(ours, contestants, name):
    peer = contestants[name].model
    assert peer.lm_head.weight is ours.lm_head.weight
    text = contestants[OURS].prompt(ONE_QUESTION)["input_ids"][:, -20:]
    torch.testing.assert_close(peer(input_ids=text).logits, ours(input_ids=text).logits)
    tower = peer.model.vision_model if name == SMOLVLM else peer.model.vision_tower
    layers = next(module for path, module in tower.named_modules() if path.endswith("layers"))
    theirs, mine = (
        sorted(tuple(weight.shape) for weight in module.parameters())
        for module in (layers, ours.model.vision_tower.layers)
    )
    assert theirs == mine


@pytest.mark.usefixtures("working_peers")
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_peers_read_the_image(contestants, name):
    prompt = contestants[name].prompt(ONE_QUESTION)
    other = prompt | {"pixel_values": prompt["pixel_values"].flip(-1)}
    model = contestants[name].model
    assert not torch.allclose(model(**prompt).logits, model(**other).logits, atol=1e-5)


@pytest.mark.parametrize("asked", [ONE_QUESTION, TWO_TURNS], ids=["one question", "two turns of two rows"])
def test_all_prompts_have_the_same_words(contestants, asked):
    words = {}
    for name, contestant in contestants.items():
        ids = contestant.prompt(asked)["input_ids"]
        ordinary = ids[ids < SIZE.vocab_size - 2]
        words[name] = ordinary.view(asked.batch, -1).tolist()
    assert words.keys() == set(NAMES)
    assert all(rows == words[OURS] for rows in words.values())


@pytest.mark.parametrize("name", [OURS, LLAVA])
def test_compiled_decoding_is_compiled_and_writes_the_same(contestants, name, monkeypatch):
    contestant = contestants[name]
    prompt = contestant.prompt(ONE_QUESTION)
    options = compiled_options(torch.device("cpu"))
    options["compile_config"].backend = "eager"  # traced all the same
    calls = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: calls.append(kwargs) or compile_(*args, **kwargs))
    output = contestant.model.generate(**prompt, **options, max_new_tokens=4, do_sample=False)
    assert [call["backend"] for call in calls] == ["eager"]
    assert torch.equal(output, contestant.generate(prompt, 4))


@pytest.mark.usefixtures("working_peers")
@torch.no_grad()
def test_flops_of_a_prompt(contestants):
    """A layer's causal attention counts half of its square: a longer question costs what its tokens add."""
    size, counts = SIZE, {}
    for name in (LLAVA, SMOLVLM):
        for tokens in (20, 50):
            prompt = contestants[name].prompt(Request(question_tokens=tokens))
            counts[name, tokens] = prompt["input_ids"].shape[1], prefill_flops(contestants[name], prompt)
        (short, few), (long, many) = counts[name, 20], counts[name, 50]
        pairs = (long * (long + 1) - short * (short + 1)) // 2
        dense = 2 * size.text_layers * (4 * size.text_width**2 + 3 * size.text_width * size.text_mlp)
        rotary = many - few - dense * (long - short) - 4 * size.text_layers * size.text_width * pairs
        # all that is left is the product that gives the angles of positions, on some versions of transformers
        assert 0 <= rotary <= (long - short) * size.text_width


def test_bytes_of_a_token(ours, contestants):
    layer = 4 * SIZE.text_width**2 + 3 * SIZE.text_width * SIZE.text_mlp + 2 * SIZE.text_width
    assert weight_bytes(ours) == 4 * (SIZE.text_layers * layer + SIZE.vocab_size * SIZE.text_width)
    assert cache_bytes(contestants[LLAVA_TILED], 100) == 4 * 2 * SIZE.text_layers * SIZE.text_width * 100


def test_what_is_compared_with_what():
    assert missing_originals(["ours", "smolvlm"]) == []
    assert missing_originals(["llava_onevision_compiled"]) == [OURS, LLAVA]
    assert default_names(SIZE) == [name for name in NAMES if name != AHEAD]  # its loop is for GPUs
    assert default_names(SIZES["3b"]) == [name for name in NAMES if name not in ("eager", "reference")]


@pytest.mark.usefixtures("working_peers")
@pytest.mark.parametrize("name", PLAIN)
def test_encoding_is_clocked_inside_of_generation(contestants, name):
    contestant = contestants[name]
    original = vars(contestant.encoder).get(contestant.method)
    with clocked(contestant.encoder, contestant.method, CPU) as times:
        contestant.generate(contestant.prompt(ONE_QUESTION), 3)
    assert len(times) == 1
    assert times[0] > 0
    assert vars(contestant.encoder).get(contestant.method) is original is None
