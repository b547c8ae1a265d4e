"""Features of images are kept for further questions, those of the images that were asked about last."""

import torch

from fusion_hf.inference.image_features import ImageFeatureCache


def test_the_oldest_images_are_forgotten():
    made: list[int] = []

    def encode(indices: list[int]) -> list[torch.Tensor]:
        made.extend(indices)
        return [torch.full((2, 3), float(index)) for index in indices]

    cache = ImageFeatureCache(limit=2 * 24, cost=lambda windows: windows.nbytes)
    cache.collect(["a", "b", "a"], encode)
    assert made == [2, 1]
    cache.collect(["a"], encode)
    cache.collect(["c"], encode)  # in place of b, though a came before it
    assert cache.total_cost == 48
    made.clear()
    (windows,) = cache.collect(["a"], encode)
    assert made == [] and windows.eq(2).all()
    assert [len(rows) for rows in cache.collect(["x", "y", "z"], encode)] == [2, 2, 2]  # more than it keeps
    assert cache.total_cost == 48


def test_a_limit_without_costs_is_a_number_of_images():
    cache = ImageFeatureCache[int](limit=2)
    assert cache.collect(["a", "b", "c"], lambda indices: indices) == [0, 1, 2]
    assert cache.total_cost == 2
    assert cache.collect(["c", "a"], lambda indices: [10 * index for index in indices]) == [2, 10]
