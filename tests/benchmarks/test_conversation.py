"""`benchmarks/conversation.py`: what it compares is what it says, and it writes what it measured."""

import json

import pytest
import torch
from conversation import MODES, Times, main, make_conversations
from workload import SIZES

ROUNDS, CONVERSATIONS = 2, 3


@pytest.fixture(scope="module")
def times():
    return Times(SIZES["tiny"], torch.float32, torch.device("cpu"), questions=2)


@torch.inference_mode()
def test_sharing_computes_the_same(times):
    features = times.model.get_global_features(times.first["pixel_values"])
    for question in times.questions:
        alone = times.model.model.encode_image(times.first["pixel_values"], question, None)
        shared = times.model.model.encode_image(times.first["pixel_values"], question, None, features)
        assert torch.equal(shared.guided.features, alone.guided.features)
        for ours, theirs in zip(shared, alone, strict=True):
            assert ours is shared.guided or torch.equal(ours, theirs)


@torch.inference_mode()
def test_the_second_turn_goes_on_with_the_first(times):
    length = times.first["input_ids"].shape[1]
    assert torch.equal(times.whole["input_ids"][:, :length], times.first["input_ids"])
    assert times.whole["prompt_end_positions"].tolist() == [[length - 1, times.whole["input_ids"].shape[1] - 1]]
    times.model(**times.whole)  # which checks the rest


def test_conversations_have_several_turns():
    records = make_conversations(CONVERSATIONS)
    assert len(records) == CONVERSATIONS
    assert all(len(record.turns) in (2, 3) and "/test/" in record.key for record in records)
    assert [record.key for record in make_conversations(CONVERSATIONS)] == [record.key for record in records]


def test_result_file(tmp_path):
    output = tmp_path / "results" / "tiny.json"
    threads = torch.get_num_threads()
    flags = ["--size", "tiny", "--repeats", ROUNDS, "--questions", 3, "--conversations", CONVERSATIONS]
    main([*map(str, flags), "--threads", str(threads), "--output", str(output)])
    result = json.loads(output.read_text())
    accuracy = result["accuracy"]
    assert accuracy["asked"]["turn 1"] == accuracy["asked"]["turn 2"] == CONVERSATIONS
    assert accuracy["right"].keys() == set(MODES)
    assert all(
        0 <= count <= accuracy["asked"][turn] for mode in MODES for turn, count in accuracy["right"][mode].items()
    )
    for figure, variants in (("tower_seconds", 2), ("first_token_seconds", 3)):
        assert len(result["repeats"][figure]) == variants
        assert all(len(values) == ROUNDS and min(values) > 0 for values in result["repeats"][figure].values())
    shared, separate = (result["repeats"]["tower_seconds"][name] for name in ("shared", "separate"))
    ratio = result["ratios"]["tower, shared / separate"]
    assert ratio["max"] == max(ours / theirs for ours, theirs in zip(shared, separate, strict=True))
