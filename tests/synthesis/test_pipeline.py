"""Whole runs: twelve categories, against a server that speaks the OpenAI protocol and a diffusers pipeline on disk."""

from collections import Counter
from itertools import count
from pathlib import Path

import pytest
from PIL import Image
from tests.helpers.openai_server import Scripted, draw_number, prompt_of
from tests.synthesis import author
from tests.synthesis.conftest import RECORDS
from tests.synthesis.runs import all_bytes, check_complete, rejected, written
from transformers import AutoProcessor

from fusion_hf.common.errors import InputError
from fusion_hf.data import load_records
from fusion_hf.inference import Conversation, nano_path
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.executors import TaskFailed
from fusion_hf.synthesis.pipeline import begin, run
from fusion_hf.synthesis.run_report import finished_report
from fusion_hf.training import FusionDataCollator

FAULTS = ("429!", "500", "drop", "half", "invalid", "cut")


def sometimes(payload: dict, repeat: int) -> str | None:
    """Each fault for some of the requests, the first time that they come."""
    number = draw_number(payload, 12)
    return FAULTS[number] if repeat == 0 and number < len(FAULTS) else None


def collate(mixture: Path, cache: Path) -> int:
    """Records of a mixture that the training collator makes a batch of."""
    records = load_records(mixture, cache=cache)
    collator = FusionDataCollator(AutoProcessor.from_pretrained(nano_path()), query_lens=(4,))
    batch = collator([records[index] for index in range(len(records))])
    assert ((batch["labels"] != -100).sum(1) > 0).all()
    assert (batch["pixel_values"].flatten(1).std(1) > 0).all()
    return len(batch["labels"])


def test_all_categories_end_to_end(server: Scripted, config_of, tmp_path: Path):
    server.faults = sometimes
    config = config_of(server)
    assert run(config)
    data = config.output / "data"
    check_complete(data, RECORDS)
    by_category = Counter(record["category"] for record in written(data))
    assert set(by_category) == set(load_categories()), rejected(data)
    collated = sum(collate(data / f"{stage}.yaml", tmp_path / "cache") for stage in ("stage1", "stage1.5"))
    assert collated == by_category.total()
    report = finished_report(data)
    assert report["records"] == RECORDS and report["written"] == collated
    assert report["models"]["describe"] == {"scripted": RECORDS}
    faults = [fault for fault in (sometimes(payload, 0) for payload in server.requests) if fault is not None]
    assert len(set(faults)) >= 5, "the server has failed in hardly any way"


def test_images_say_what_they_are_and_pairs_are_one(server: Scripted, config_of):
    config = config_of(server, categories={"SynthContrastShort": 1}, records=2)
    run(config)
    folder = config.output / "work" / "pictures"
    singles, pairs = sorted(folder.rglob("*-[01].png")), sorted(folder.rglob("*-pair.png"))
    assert (len(singles), len(pairs)) == (4, 2)
    with Image.open(singles[0]) as single, Image.open(pairs[0]) as pair:
        assert single.text["model"] == str(config.images.model) and "wooden table" in single.text["prompt"]
        assert single.text["seed"].isdecimal()
        assert pair.width > 2 * single.width and pair.height == single.height


def test_a_second_run_gives_the_same_bytes(server: Scripted, config_of):
    categories = {"SynthContrastShort": 1, "SynthMultiChoice": 1, "SynthText": 1}
    first, second = (config_of(server, name, records=9, categories=categories) for name in ("first", "second"))
    run(first)
    server.faults = lambda payload, repeat: "500" if repeat == 0 and draw_number(payload, 3) == 0 else None
    server.repeats.clear()
    run(second)
    assert all_bytes(first.output / "data") == all_bytes(second.output / "data")
    assert all_bytes(first.output / "work" / "pictures") == all_bytes(second.output / "work" / "pictures")


def test_other_settings_need_another_folder(server: Scripted, config_of):
    begin(config_of(server))
    with pytest.raises(InputError, match=r"`seed` must be 3, .*got 4"):
        begin(config_of(server, seed=4))
    with pytest.raises(InputError, match=r"`writer.temperature` must be 0.7, .*got 0.1"):
        begin(config_of(server, writer__temperature=0.1))
    begin(config_of(server, writer__concurrency=1, writer__url="http://elsewhere:1"))


def test_a_writer_that_never_learns_is_rejected_by_name(server: Scripted, config_of):
    server.writer = lambda payload: "I would rather not."
    config = config_of(server, records=4, writer__tries=2, executor__tasks=1)
    run(config)
    reasons = [record["rejection"] for record in rejected(config.output / "data")]
    assert [reason["step"] for reason in reasons] == ["describe"] * 4
    assert all("no valid answer in 2 tries" in reason["reason"] for reason in reasons)
    seeds = Counter(payload["seed"] for payload in server.requests)
    assert len(seeds) == 8  # a new seed for each try


def test_a_dead_endpoint_ends_the_run_and_nothing_is_lost(server: Scripted, config_of):
    config = config_of(server, records=4, writer__patience=1)
    server.faults = lambda payload, repeat: "500"
    with pytest.raises(TaskFailed, match="does not answer: HTTP 500"):
        run(config)
    server.faults = lambda payload, repeat: None
    run(config)
    check_complete(config.output / "data", 4)
    assert not rejected(config.output / "data")
    asked = len(server.requests)
    assert run(config) and len(server.requests) == asked  # a finished run asks nothing again


def test_judge_and_viewer(server: Scripted, config_of):
    judged = {True: count(), False: count()}  # with and without an image: the first of every three is refused

    def write(payload: dict) -> str:
        if "Score from 1 to 5" not in prompt_of(payload):
            return author.write(payload)
        sees = isinstance(payload["messages"][0]["content"], list)
        return author.judge(5 if next(judged[sees]) % 3 else 2)

    server.writer = write
    endpoint = {"model": "judge", "url": server.url, "temperature": 0}
    config = config_of(server, records=12, judge=endpoint, image_check={"endpoint": endpoint}, executor__tasks=1)
    run(config)
    check_complete(config.output / "data", 12)
    steps = Counter(record["rejection"]["step"] for record in rejected(config.output / "data"))
    assert steps["judge"] > 0 and steps["image_check"] > 0 and written(config.output / "data")
    assert not list((config.output / "work" / "pictures").rglob("*.draft*"))


def test_fusion_itself_looks_at_the_images(server: Scripted, config_of, monkeypatch: pytest.MonkeyPatch):
    answers = iter([author.judge(2), author.judge(5)])
    asked = []
    real = Conversation.ask

    def ask(self: Conversation, question: str) -> str:
        asked.append((question, real(self, question)))  # what fusion-nano itself says is no judgement
        return next(answers)

    monkeypatch.setattr(Conversation, "ask", ask)
    check = {"fusion": "nano", "device": "cpu"}
    config = config_of(server, records=2, image_check=check, categories={"SynthColor": 1}, executor__tasks=1)
    run(config)
    assert [record["rejection"]["step"] for record in rejected(config.output / "data")] == ["image_check"]
    assert len(written(config.output / "data")) == 1
    assert all("wooden table" in question and answer for question, answer in asked)


def test_parquet_and_an_images_endpoint(server: Scripted, config_of, tmp_path: Path):
    images = {"kind": "openai", "model": "painter", "url": server.url, "width": 32, "height": 32}
    config = config_of(
        server, images=images, format="parquet", categories={"SynthColor": 1}, records=6, executor__tasks=1
    )
    run(config)
    data = config.output / "data"
    check_complete(data, 6)
    assert collate(data / "stage1.yaml", tmp_path / "cache") == len(written(data)) > 0


def test_near_duplicates_of_captions_are_left_out(server: Scripted, config_of):
    config = config_of(server, records=4, pool__near_duplicates=True, executor__tasks=1)
    pool = Path(config.pool.source)
    lines = pool.read_text().splitlines()
    pool.write_text("\n".join([lines[0], lines[0] + "!", "a quiet lake under tall snowy mountains at dawn"]))
    run(config)
    data = config.output / "data"
    assert len([*written(data), *rejected(data)]) == 2
    unusable = (config.output / "work" / "pool" / "unusable.jsonl").read_text()
    assert "nearly that of caption 0" in unusable


def test_answer_letters_are_balanced(server: Scripted, config_of):
    config = config_of(server, records=8, categories={"SynthMultiChoice": 1}, executor__tasks=1)
    run(config)
    letters = finished_report(config.output / "data")["categories"]["SynthMultiChoice"]["answer_letters"]
    assert max(letters.values()) - min(letters.values()) <= 1 and set(letters) == set("ABCD")
