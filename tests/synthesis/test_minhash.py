"""Near-duplicates of captions, in one process and by datatrove's stages."""

from pathlib import Path

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor

from fusion_hf.synthesis.filters.minhash import MinHash, NearDuplicates, minhash_stages
from fusion_hf.synthesis.record import SynthRecord

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
    rule = NearDuplicates()
    for index, (caption, kept) in enumerate(CAPTIONS.items()):
        reason = rule.check(SynthRecord(str(index), "SynthColor", caption, 0))
        assert (reason is None) == kept, caption
    assert rule.check(SynthRecord("9", "SynthColor", FIRST, 0)) == "the caption is nearly that of 0"


def test_stricter():
    rule = NearDuplicates(MinHash(n_grams=1, buckets=1, hashes=64))
    for caption in CAPTIONS:
        assert rule.check(SynthRecord("1", "SynthColor", caption, 0)) is None or caption == "Dog."


def test_stages_of_datatrove(tmp_path: Path):
    captions = [caption for caption in CAPTIONS if " " in caption]
    documents = [Document(text, str(index)) for index, text in enumerate(captions)]
    stages = minhash_stages(tmp_path / "minhash", MinHash())
    kept: list[str] = []

    def collect(data, rank: int = 0, world_size: int = 1):
        for document in data:
            kept.append(document.text)
            yield document

    steps = ([documents, stages.signature], [stages.buckets], [stages.cluster], [documents, stages.keep, collect])
    for number, (pipeline, tasks) in enumerate(zip(steps, (1, MinHash().buckets, 1, 1), strict=True)):
        logs = str(tmp_path / f"logs{number}")
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=logs).run()
    assert sum("brown dog runs" in caption for caption in kept) == 1
    assert [caption for caption in kept if "runs" not in caption] == [c for c in captions if "runs" not in c]
