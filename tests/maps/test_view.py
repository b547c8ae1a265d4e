"""Maps lie where the model's patches lie, and words have their own tokens."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.tiny import tiny_config

from fusion_hf import FusionImageProcessor
from fusion_hf.inference import nano_path
from fusion_hf.maps import Maps, View, Word
from fusion_hf.maps.view import find_words
from fusion_hf.model.processing_fusion import FusionProcessor

WIDE = (90, 40)  # width, height


@pytest.mark.parametrize("cells", [1, 2, 6])
@pytest.mark.parametrize("tiles", [1, 2])
def test_whole_patches_are_resized_as_torch_does(cells: int, tiles: int):
    values = np.random.default_rng(0).random((2, 3, cells, cells), dtype=np.float32)
    view = View(tiles, 1.0, *WIDE)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values), size=WIDE[::-1], mode="bilinear")
    np.testing.assert_allclose(view.resize(values), expected.numpy(), atol=1e-5)
    assert view.resize(values, (7, 5)).shape == (2, 3, 5, 7)


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_patch_is_where_the_processor_puts_its_pixels(tiles: int):
    """A white spot in an image of any shape lights one patch, and that patch's map is brightest at the spot."""
    size, patch = 50, 8  # six patches, and two pixels that no patch covers
    processor = FusionImageProcessor(size={"height": size, "width": size})
    side = size // patch
    config = tiny_config(vision={"image_size": size, "patch_size": patch})
    view = View.of(config, tiles, WIDE)
    assert view.coverage == side * patch / size
    for left, top in ((4, 3), (40, 18), (60, 25), (78, 32)):
        image = Image.new("RGB", WIDE)
        image.paste((255, 255, 255), (left, top, left + 4, top + 2))
        pixels = processor(image, return_tensors="pt")["pixel_values"][0, :, 0] + 1  # (5, H, W), black is 0
        patches = torch.nn.functional.avg_pool2d(pixels.unsqueeze(1), patch)[:, 0]  # (5, P, P)
        if tiles == 1:
            grid = patches[4]
        else:
            grid = torch.cat([torch.cat([patches[0], patches[1]], 1), torch.cat([patches[2], patches[3]], 1)], 0)
        whole = view.resize(grid.numpy())
        row, column = np.unravel_index(whole.argmax(), whole.shape)
        cell = (WIDE[0] / side / tiles, WIDE[1] / side / tiles)
        assert abs(column + 0.5 - left - 2) <= cell[0] and abs(row + 0.5 - top - 1) <= cell[1]


def test_what_no_patch_covers_is_as_its_neighbour():
    view = View(1, 0.5, 8, 8)
    resized = view.resize(np.array([[1.0, 2.0]], dtype=np.float32))
    np.testing.assert_allclose(resized[0], [1, 1.25, 1.75, 2, 2, 2, 2, 2])
    both = View(2, 0.5, 8, 8).resize(np.array([[1.0, 2.0]], dtype=np.float32))
    np.testing.assert_allclose(both[0], [1, 1.25, 1.5, 1.5, 1.75, 2, 2, 2])


def test_a_word_is_the_mean_of_its_tokens():
    values = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    maps = Maps(values, (range(1),), (Word("shape?", 1, 3),), View(1, 1.0, 4, 4))
    assert maps.of_word(maps.words[0]).tolist() == [[[6, 7], [8, 9]]]
    assert maps.on_image(maps.words[0]).shape == (1, 4, 4)
    assert maps.on_image(maps.words[0], (10, 5)).shape == (1, 5, 10)


@pytest.mark.parametrize("text", ["what color is the shape?", "Is the\nword zürich here", "a", ""])
def test_words_are_those_of_the_text(text: str):
    tokenizer = FusionProcessor.from_pretrained(nano_path()).tokenizer
    end = tokenizer.eos_token_id
    ids = [*tokenizer.encode(text, add_special_tokens=False), end]
    words = find_words(tokenizer, ids)
    assert [word.text for word in words] == text.split()
    assert all(tokenizer.decode(ids[word.first : word.end]).strip() == word.text for word in words)
    # every token but the end has its word
    assert [place for word in words for place in range(word.first, word.end)] == list(range(len(ids) - 1))


def test_spaces_are_no_words():
    tokenizer = FusionProcessor.from_pretrained(nano_path()).tokenizer
    words = find_words(tokenizer, tokenizer.encode("is   there ", add_special_tokens=False))
    assert [word.text for word in words] == ["is", "there"]
