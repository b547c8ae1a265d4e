"""Order of records: grouped, seeded, the same for every process, and nothing lost."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from fusion_hf.training.sampler import StepLayout, StepSampler, estimate_tokens, query_len_of_step

QUERY_LENS = [4, 16, 36]


def lengths(images: int, texts: int, seed: int = 0) -> np.ndarray:
    """Words of shuffled records, negative without an image."""
    generator = np.random.default_rng(seed)
    words = generator.integers(1, 300, images + texts)
    words[images:] *= -1
    return generator.permutation(words).astype(np.int32)


def steps_of(sampler: StepSampler) -> list[list]:
    keys = list(sampler)
    size = sampler.layout.global_batch_size
    return [keys[begin : begin + size] for begin in range(0, len(keys), size)]


def make(images=90, texts=50, layout=None, seed=0, grouped=True) -> StepSampler:
    words = lengths(images, texts)
    return StepSampler(len(words), layout or StepLayout(2, 2, 2), QUERY_LENS, seed, words if grouped else None)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("layout", [StepLayout(4), StepLayout(2, 2, 2), StepLayout(3, 4)])
def test_every_record_comes_once_and_only_the_last_step_is_filled_up(layout, grouped):
    sampler = make(layout=layout, grouped=grouped)
    keys = list(sampler)
    assert len(keys) == len(sampler)
    indices = [key.index for key in keys]
    assert sorted(indices[: sampler.num_records]) == list(range(140))
    filled = indices[sampler.num_records :]
    assert filled == indices[: len(filled)]
    assert len(keys) % (layout.batch_size * layout.world_size) == 0 or layout.world_size == 1


def test_a_step_holds_one_modality_but_for_the_last_two():
    sampler = make()
    steps = steps_of(sampler)
    kinds = [{bool(sampler.lengths[key.index] > 0) for key in step} for step in steps]
    complete = 89 // 8 + 49 // 8
    assert all(len(kind) == 1 for kind in kinds[:complete])
    assert {True} in kinds[:complete] and {False} in kinds[:complete]
    assert kinds.index({True}) < complete - 1 and kinds[:complete] != sorted(kinds[:complete], key=str)


def test_micro_batches_of_a_step_hold_about_the_same_number_of_words():
    sampler = make(images=800, texts=0, layout=StepLayout(4, 2, 2))
    ordered, random_order = [], []
    for step in steps_of(sampler)[:-1]:
        words = np.abs(sampler.lengths[[key.index for key in step]])
        ordered.append(np.ptp(words.reshape(4, 4).sum(1)))
        random_order.append(np.ptp(np.random.default_rng(0).permutation(words).reshape(4, 4).sum(1)))
    assert np.mean(ordered) < 0.3 * np.mean(random_order)


def test_a_step_holds_the_same_records_however_it_is_split():
    one = [sorted(key.index for key in step) for step in steps_of(make(layout=StepLayout(8)))]
    split = [sorted(key.index for key in step) for step in steps_of(make(layout=StepLayout(2, 2, 2)))]
    assert one[:-2] == split[: len(one) - 2]


def test_order_follows_from_seed_and_epoch():
    first, again, other = make(), make(), make(seed=1)
    assert list(first) == list(again)
    assert list(first) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)
    assert sorted(key.index for key in again) == sorted(key.index for key in first)


def test_all_records_of_a_step_have_its_query_len_and_epochs_count_on():
    sampler = make()
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        for number, step in enumerate(steps_of(sampler)):
            expected = query_len_of_step(epoch * sampler.steps_per_epoch + number, QUERY_LENS, 0)
            assert {key.query_len for key in step} == {expected}


@pytest.mark.parametrize("layout", [StepLayout(4), StepLayout(3, 2), StepLayout(2, 2, 2), StepLayout(3, 4, 2)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_has_as_many_steps_as_its_loader(layout, drop_last):
    """By which the epochs of all processes are counted."""
    for records in (24, 31, 40, 101):
        sampler = StepSampler(records, layout, QUERY_LENS, 0, drop_last=drop_last)
        batches = BatchSampler(sampler, layout.batch_size, drop_last)
        share = len(list(BatchSamplerShard(batches, layout.world_size, 0))) if layout.world_size > 1 else len(batches)
        assert sampler.steps_per_epoch == -(-share // layout.accumulation)


def test_every_query_len_is_drawn_about_as_often():
    drawn = [query_len_of_step(step, QUERY_LENS, 0) for step in range(3000)]
    assert all(abs(drawn.count(length) / 3000 - 1 / 3) < 0.04 for length in QUERY_LENS)
    assert drawn != [query_len_of_step(step, QUERY_LENS, 1) for step in range(3000)]


def sized(layout: StepLayout, seed: int = 0) -> StepSampler:
    words = lengths(4000, 1000)
    turns = np.random.default_rng(1).integers(1, 12, len(words))
    return StepSampler(len(words), layout, QUERY_LENS, seed, words, sizes=estimate_tokens(words, turns, QUERY_LENS))


@pytest.mark.parametrize("layout", [StepLayout(4), StepLayout(2, 2, 2), StepLayout(3, 4)])
def test_by_size_every_record_comes_once(layout: StepLayout):
    sampler = sized(layout)
    indices = [key.index for key in sampler]
    assert sorted(indices[: sampler.num_records]) == list(range(5000)) and len(indices) == len(sampler)
    assert indices == [key.index for key in sized(layout)]
    assert indices != [key.index for key in sized(layout, seed=1)]
    sampler.set_epoch(1)
    assert indices != [key.index for key in sampler]


def test_by_size_all_of_a_step_is_about_as_large():
    """In each micro-batch and in each process, and of one modality."""
    layout = StepLayout(4, 2, 2)
    sampler = sized(layout)
    steps = [[key.index for key in step] for step in steps_of(sampler)][:-3]
    assert all(len({bool(sampler.lengths[index] > 0) for index in step}) == 1 for step in steps)
    spreads = [np.ptp(sampler.sizes[step]) for step in steps]
    assert np.median(spreads) < 0.05 * np.ptp(sampler.sizes)
    means = [sampler.sizes[step].mean() for step in steps]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_estimated_tokens():
    """1.35 a word, 6 a turn, and of records with an image the mean of the latents and their two marks."""
    found = estimate_tokens(np.array([100, -100]), np.array([2, 3]), [4, 36])
    np.testing.assert_allclose(found, [135 + 2 * (6 + 20 + 2), 135 + 3 * 6])
