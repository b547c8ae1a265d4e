"""The number of latent tokens: drawn for each batch or step, by every worker, in every epoch, and again on resume."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.training_runs import write_model
from torch.utils.data import DataLoader, IterableDataset

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.training import FusionDataCollator, FusionTrainer, FusionTrainingArguments
from fusion_hf.training.query_len_records import QueryLenIterable
from fusion_hf.training.query_lens import BatchDraw
from fusion_hf.training.sampler import StepLayout, StepSampler, query_len_of_step

QUERY_LENS = [1, 4, 9, 16, 25, 36]
ANSWER = {"role": "assistant", "content": "red"}


def make_records(count: int = 24) -> list[dict]:
    """Without ids, all of the same words, but each with an image of its own."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(count)]
    question = {"role": "user", "content": "what color is the shape ?"}
    return [{"image": image, "messages": [question, ANSWER]} for image in images]


@pytest.fixture(scope="module")
def processor():
    return FusionProcessor.from_pretrained(nano_path())


def drawn(batches) -> list[int]:
    return [batch["query_len"] for batch in batches]


# ---- the collator alone ----


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_and_epochs_draw_for_each_batch(processor, persistent):
    loader = DataLoader(
        make_records(),
        batch_size=1,
        collate_fn=FusionDataCollator(processor, QUERY_LENS),
        num_workers=2,
        persistent_workers=persistent,
    )
    epochs = [drawn(loader) for _ in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) > 3
        assert epoch[::2] != epoch[1::2]
    assert epochs[0] != epochs[1] != epochs[2]


def test_one_process_draws_anew_in_each_epoch(processor):
    loader = DataLoader(make_records(), batch_size=1, collate_fn=FusionDataCollator(processor, QUERY_LENS))
    assert drawn(loader) != drawn(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_that_says_its_epoch_draws_the_same_after_a_resume(processor, workers):
    records = make_records()

    def epoch(number, first=0):
        collator = FusionDataCollator(processor, QUERY_LENS)
        collator.set_epoch(number)
        return drawn(DataLoader(records[first:], batch_size=2, collate_fn=collator, num_workers=workers))

    assert epoch(1, first=10) == epoch(1)[5:]
    assert epoch(0) != epoch(1)


def test_every_number_is_drawn_about_as_often():
    draw = BatchDraw(QUERY_LENS, seed=0)
    counts = Counter(draw([[{"role": "user", "content": str(number)}]]) for number in range(3000))
    assert all(abs(counts[length] / 3000 - 1 / 6) < 0.03 for length in QUERY_LENS)
    other = BatchDraw(QUERY_LENS, seed=1)
    assert [other([[{"role": "user", "content": str(n)}]]) for n in range(50)] != [
        BatchDraw(QUERY_LENS, seed=0)([[{"role": "user", "content": str(n)}]]) for n in range(50)
    ]


# ---- iterable data sets ----


class Records(IterableDataset):
    """Records in their order, dealt to workers; sized or not."""

    def __init__(self, records):
        self.records, self.epochs = records, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        return iter(self.records if info is None else self.records[info.id :: info.num_workers])


class SizedRecords(Records):
    def __len__(self):
        return len(self.records)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_has_the_number_of_its_step(workers):
    records = [{"id": number} for number in range(40)]
    layout = StepLayout(2, accumulation=3)
    iterable = QueryLenIterable(Records(records), layout, QUERY_LENS, seed=3)
    loader = iter(DataLoader(iterable, batch_size=2, num_workers=workers, collate_fn=list))
    batches = [next(loader) for _ in range(30)]  # beyond the end of the records, which have no length
    for number, batch in enumerate(batches):
        assert {record["query_len"] for record in batch} == {query_len_of_step(number // 3, QUERY_LENS, 3)}
    assert sorted(record["id"] for batch in batches[:20] for record in batch) == list(range(40))


def test_a_sized_iterable_ends_and_its_epochs_count_on():
    records = SizedRecords([{"id": number} for number in range(10)])
    iterable = QueryLenIterable(records, StepLayout(2, accumulation=2), QUERY_LENS, seed=3)
    for epoch in (0, 1):
        iterable.set_epoch(epoch)
        found = [record["query_len"] for record in iterable]
        assert found == [query_len_of_step(3 * epoch + place // 4, QUERY_LENS, 3) for place in range(10)]
    assert records.epochs == [0, 1]


def test_an_iterable_without_records_ends():
    assert list(QueryLenIterable(Records([]), StepLayout(2), QUERY_LENS, seed=0)) == []


# ---- the trainer ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


class WatchedTrainer(FusionTrainer):
    """Keeps what it was given to train on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append((int(inputs["query_len"]), inputs["input_ids"][:, -8:].flatten().tolist()))
        return super().training_step(model, inputs, *args, **kwargs)


def make_trainer(folder, output, records, stop_at=None, **settings):
    model = FusionForConditionalGeneration.from_pretrained(folder)
    arguments = FusionTrainingArguments(
        str(output),
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "query_lens": [1, 4, 9],
            "max_steps": 8,
            "save_steps": 3,
            "report_to": "none",
            "disable_tqdm": True,
            "peak_tflops": 1.0,
            "group_by": "none",
            **settings,
        },
    )
    return WatchedTrainer(model, arguments, FusionDataCollator(FusionProcessor.from_pretrained(folder)), records)


def write_ids(records):
    words = "red blue two one no yes circle square".split()
    return [
        {**record, "messages": [record["messages"][0], {**ANSWER, "content": words[number % 8]}]}
        for number, record in enumerate(records)
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [list, Records, SizedRecords])
def test_a_run_draws_in_every_step_and_resumes_as_it_was(folder, tmp_path, kind, workers):
    records = write_ids(make_records(20))
    straight = make_trainer(folder, tmp_path / "a", kind(records), dataloader_num_workers=workers)
    straight.train()
    lens = [query_len for query_len, _ in straight.seen]
    assert len(lens) == 16 and lens[::2] == lens[1::2]  # a step has one
    assert lens[::2] == [query_len_of_step(step, [1, 4, 9], straight.seed) for step in range(8)]
    assert len(set(lens)) == 3
    resumed = make_trainer(folder, tmp_path / "b", kind(records), dataloader_num_workers=workers)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))  # in the second epoch
    assert resumed.seen == straight.seen[12:]


def test_a_run_may_draw_for_each_micro_batch(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, make_records(20), query_len_draw="micro_batch")
    trainer.train()
    lens = [query_len for query_len, _ in trainer.seen]
    assert lens[::2] != lens[1::2]
    assert lens[:4] == [query_len_of_step(n // 2, [1, 4, 9], trainer.seed, n % 2) for n in range(4)]


def test_a_stream_of_datasets_trains(folder, tmp_path):
    rows = [{"messages": record["messages"]} for record in make_records(20)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(folder, tmp_path, stream, max_steps=6)
    trainer.train()
    assert len({query_len for query_len, _ in trainer.seen}) > 1


# ---- micro-batches ----


def test_each_micro_batch_of_all_processes_draws_its_own():
    sampler = StepSampler(64, StepLayout(2, world_size=2, accumulation=4), QUERY_LENS, seed=0, per_micro_batch=True)
    keys = list(sampler)
    batches = [{key.query_len for key in keys[begin : begin + 2]} for begin in range(0, 64, 2)]
    assert all(len(batch) == 1 for batch in batches)
    expected = [query_len_of_step(number // 8, QUERY_LENS, 0, number % 8) for number in range(32)]
    assert [batch.pop() for batch in batches] == expected
    assert len(set(expected[:8])) > 2
