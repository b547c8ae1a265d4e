"""Records of the data engine: JSON and back, rejection, and the training record format."""

import json

import pytest

from fusion_hf.data import record_parsing
from fusion_hf.data.record_parsing import parse_record
from fusion_hf.model.processing_fusion import IMAGE_TOKEN
from fusion_hf.synthesis.synth_record import RecordTurn, Rejection, StepOrigin, SynthRecord

FULL = SynthRecord(
    id="SynthColor-7",
    category="SynthColor",
    caption="a bus “in” the rain",
    seed=7,
    descriptions=("A red bus.",),
    images=("ab/7.png",),
    turns=(RecordTurn("What color is the bus?", "Red"), RecordTurn("What is wet?", "The road")),
    facts={"pictures": [{"shapes": [{"kind": "circle", "left": 1.5}]}]},
    origins={"describe": StepOrigin("writer", "00ff", 3)},
)


def test_json_and_back():
    for record in (FULL, FULL.rejected("length", "too long"), SynthRecord("1", "SynthText", "", 0)):
        assert SynthRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "has the unknown key 'colour'.*caption"),
        ({"id": 5}, "id.*text.*got 5"),
        ({"turns": "no"}, "turns.*a list.*got 'no'"),
        ({"turns": [{"question": "What?"}]}, "answer"),
        ({"facts": []}, r"facts.*a mapping of keys to values.*got \[\]"),
        ({"rejection": {"step": "x"}}, "reason"),
        ({"descriptions": [1]}, r"descriptions\[0\].*text.*got 1"),
    ],
)
def test_other_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SynthRecord.from_dict({**FULL.to_dict(), **change})


def test_missing_field():
    with pytest.raises(ValueError, match="seed"):
        SynthRecord.from_dict({"id": "1", "category": "SynthText", "caption": ""})


def test_rejection_keeps_the_rest():
    rejected = FULL.rejected("colors", "blue is not in the description")
    assert rejected.rejection == Rejection("colors", "blue is not in the description")
    assert rejected.turns == FULL.turns
    with pytest.raises(ValueError, match="rejected by colors: blue"):
        rejected.training_record()


def test_training_record_is_what_training_reads():
    record = parse_record(FULL.training_record(), 0)
    assert (record.id, record.image) == ("SynthColor-7", "ab/7.png")
    assert [message["role"] for message in record.messages] == ["user", "assistant", "user", "assistant"]
    assert record.messages[0]["content"].strip() == "What color is the bus?"
    assert record.messages[3]["content"] == "The road"
    assert record_parsing.IMAGE_TOKEN == IMAGE_TOKEN


def test_a_training_record_has_one_image_and_a_turn():
    pair = SynthRecord.from_dict({**FULL.to_dict(), "images": ["a.png", "b.png"]})
    silent = SynthRecord.from_dict({**FULL.to_dict(), "turns": []})
    for record, amounts in ((pair, "2 turns and 2 images"), (silent, "0 turns and 1 images")):
        with pytest.raises(ValueError, match=amounts):
            record.training_record()
