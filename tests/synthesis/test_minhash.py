"""Near-duplicates of captions."""

from dataclasses import replace

from fusion_hf.synthesis.filters.minhash import NEARLY, NearDuplicatesFilter
from fusion_hf.synthesis.synth_record import SynthRecord

FIRST = "A brown dog runs across a green field under a blue sky"
CAPTIONS = {
    FIRST: True,
    "A brown dog runs across the green field, under a blue sky.": False,
    "a brown dog runs across a green field under a clear blue sky": False,
    "A white dog sits beside a lake in the evening": True,
    "dog": True,
    "Dog.": False,
    "cat": True,
    "A brown dog sleeps under a table": True,
}


def test_in_memory():
    rule = NearDuplicatesFilter()
    for index, (caption, kept) in enumerate(CAPTIONS.items()):
        reason = rule.check(SynthRecord(str(index), "SynthColor", caption, 0))
        assert (reason is None) == kept, caption
    assert rule.check(SynthRecord("9", "SynthColor", FIRST, 0)) == "the caption is nearly that of 0"


def test_stricter():
    rule = NearDuplicatesFilter(replace(NEARLY, n_grams=1, num_buckets=1, hashes_per_bucket=64))
    for caption in CAPTIONS:
        assert rule.check(SynthRecord("1", "SynthColor", caption, 0)) is None or caption == "Dog."
