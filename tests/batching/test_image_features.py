"""Features of images are kept for further questions, those of the images that were asked about last."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fusion_hf.inference.image_feature_cache import ENTRY_BYTES, ImageFeatureCache
from fusion_hf.inference.image_features import pool_map
from fusion_hf.model.modeling_fusion_vision import pool_context

VALUES = 6
COST = VALUES * 4 + ENTRY_BYTES


class Encoder:
    """Makes features that say which index they are of, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, indices: list[int]) -> list[torch.Tensor]:
        self.made.extend(indices)
        return [torch.full((VALUES,), float(index)) for index in indices]


def test_the_oldest_images_are_forgotten():
    encode, cache = Encoder(), ImageFeatureCache[torch.Tensor](2 * COST)
    assert [int(features[0]) for features in cache.collect(["a", "b", "a"], encode)] == [2, 1, 2]
    assert encode.made == [2, 1]  # equal ones once
    cache.collect(["a"], encode)
    cache.collect(["c"], encode)  # in place of b, though a came before it
    assert cache.nbytes == 2 * COST
    encode.made.clear()
    (features,) = cache.collect(["a"], encode)
    assert encode.made == [] and features.eq(2).all()
    assert len(cache.collect(["x", "y", "z"], encode)) == 3  # more than it keeps
    assert (len(cache), cache.nbytes) == (2, 2 * COST)


def test_what_is_too_large_is_not_kept():
    encode, cache = Encoder(), ImageFeatureCache[torch.Tensor](COST)
    cache.collect(["small"], encode)
    cache.collect(["large"], lambda _: [torch.zeros(VALUES + 1)])
    encode.made.clear()
    cache.collect(["small"], encode)
    assert encode.made == []
    assert ImageFeatureCache[torch.Tensor](0).collect(["a", "a"], encode)[0].eq(1).all()
    assert encode.made == [1]


def test_tiny_features_do_not_fill_the_memory():
    cache = ImageFeatureCache[torch.Tensor](100 * ENTRY_BYTES)
    for key in range(1000):
        cache.collect([key], lambda _: [torch.zeros(1)])
    assert len(cache) <= 100


def test_features_of_another_state_are_forgotten():
    encode, cache = Encoder(), ImageFeatureCache[torch.Tensor]()
    cache.collect(["a"], encode, "before")
    cache.collect(["a"], encode, "after")
    assert (len(encode.made), len(cache), cache.nbytes) == (2, 1, COST)

    def change(indices: list[int]) -> list[torch.Tensor]:
        cache.collect([], encode, "changed while this was encoded")
        return encode(indices)

    cache.collect(["b"], change, "after")
    assert len(cache) == 0


def test_an_error_leaves_nothing():
    cache = ImageFeatureCache[torch.Tensor]()

    def fail(_: list[int]) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        cache.collect(["a"], fail)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_threads_share_it():
    cache = ImageFeatureCache[torch.Tensor](3 * COST)

    def use(first: int) -> None:
        for step in range(200):
            keys = [(first + step) % 7, (first * step) % 5]

            def encode(rows: list[int], keys: list[int] = keys) -> list[torch.Tensor]:
                return [torch.full((VALUES,), float(keys[row])) for row in rows]

            assert [int(features[0]) for features in cache.collect(keys, encode)] == keys

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(8)))
    assert (len(cache), cache.nbytes) == (3, 3 * COST)


@pytest.mark.parametrize("side", [6, 12, 54])
@pytest.mark.parametrize("query_len", [1, 4, 16, 36, 144])
def test_a_pooled_map_shows_the_same(side: int, query_len: int):
    features = torch.randn(2, 3, side, side)
    for window in (1, 2, 3):
        pooled = pool_map(features, query_len, window)
        assert pooled.shape[-1] <= side
        for expected, given in zip(
            pool_context(features, query_len, window), pool_context(pooled, query_len, window), strict=True
        ):
            assert torch.equal(expected, given)
