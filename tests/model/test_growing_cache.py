"""A cache that grows in its room holds what transformers' own holds, and answers stay the same, bit by bit."""

import pytest
import torch
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fusion_hf.model import cache_fusion, generation_fusion
from fusion_hf.model.cache_fusion import RoomyLayer, RoomySlidingLayer, give_room

NEW_TOKENS = 12
WINDOW = 14  # fills up on the way


@pytest.fixture(autouse=True)
def small_room(monkeypatch):
    """So that layers move into larger rooms within a few tokens."""
    monkeypatch.setattr(cache_fusion, "ROOM", 3)


def logits_of(model, inputs, **options):
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False} | options,
    )
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_answers_are_the_same_bits(backbone, monkeypatch):
    window = {"sliding_window": 40} if backbone in ("mistral", "phi3") else {}  # which the answer outgrows
    config = tiny_config(backbone, text=window)
    model = tiny_model(config)
    inputs = make_inputs(config, [Sample([5]), Sample([3, 4], [6], seed=1)], padding_side="left")
    layers = []

    def give_and_note(cache):
        give_room(cache)
        layers.extend(map(type, cache.layers))

    monkeypatch.setattr(generation_fusion, "give_room", give_and_note)
    with torch.inference_mode():
        tokens, logits = logits_of(model, inputs)
        monkeypatch.setattr(generation_fusion, "give_room", lambda cache: None)
        expected_tokens, expected = logits_of(model, inputs)
    assert layers and set(layers) <= {RoomyLayer, RoomySlidingLayer}
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected)


def test_beams_are_the_same_bits(monkeypatch):
    config = tiny_config()
    model, inputs = tiny_model(config), make_inputs(config, [Sample([5])])
    tokens, logits = logits_of(model, inputs, num_beams=3)
    monkeypatch.setattr(generation_fusion, "give_room", lambda cache: None)
    expected_tokens, expected = logits_of(model, inputs, num_beams=3)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected)


def states(generator, rows, count):
    return torch.randn(rows, 2, count, 4, generator=generator), torch.randn(rows, 2, count, 4, generator=generator)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RoomyLayer, DynamicLayer),
        (lambda: RoomySlidingLayer(sliding_window=WINDOW), lambda: DynamicSlidingWindowLayer(sliding_window=WINDOW)),
    ],
    ids=["full", "sliding"],
)
def test_layers_hold_the_same(ours, theirs):
    generator, layers = torch.Generator().manual_seed(0), (ours(), theirs())
    rows = 2
    kept = []

    def update(count):
        new = states(generator, rows, count)
        found, expected = (layer.update(*new) for layer in layers)
        kept.append((found[0], found[0].clone()))
        assert all(map(torch.equal, found, expected))
        assert layers[0].get_seq_length() == layers[1].get_seq_length()
        assert layers[0].get_mask_sizes(1) == layers[1].get_mask_sizes(1)

    update(4)
    with torch.inference_mode():
        update(1)
    update(1)  # the room of inference mode cannot be written any more
    for layer in layers:
        layer.crop(-2)
    update(2)
    for layer in layers:
        layer.reorder_cache(torch.tensor([1, 0]))
    update(1)
    for layer in layers:
        layer.batch_repeat_interleave(2)
    rows = 4
    for count in (1, 2, 1, 3, 1, 1):  # beyond the window
        update(count)
    assert all(torch.equal(view, copy) for view, copy in kept)  # what was handed out before did not change
    for layer in layers:
        layer.reset()
    update(2)


def test_a_room_is_written_and_not_copied():
    layer, generator = RoomyLayer(), torch.Generator().manual_seed(0)
    places = [layer.update(*states(generator, 1, 1))[0].data_ptr() for _ in range(5)]
    assert places[0] == places[1] == places[2] == places[3] != places[4]


def test_only_a_new_cache_of_transformers_own_kind_gets_room():
    config = tiny_config().text_config
    used = DynamicCache(config=config)
    used.update(*states(torch.Generator().manual_seed(0), 1, 1), layer_idx=0)
    give_room(used)
    give_room(None)
    assert {type(layer) for layer in used.layers} == {DynamicLayer}
    new = DynamicCache(config=config)
    give_room(new)
    assert {type(layer) for layer in new.layers} == {RoomyLayer}
