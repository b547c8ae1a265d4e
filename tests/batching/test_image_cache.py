"""Tiles of an image are encoded once for all questions about it, and anew as soon as the model is another one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from tests.helpers.tiny import tiny_config, tiny_model

from fusion_hf import batch_generate
from fusion_hf.inference import ChatModel
from fusion_hf.inference.encoder_state import EncoderState
from fusion_hf.inference.image_feature_cache import ImageFeatureCache

QUESTIONS = [f"what color is the {word}?" for word in "shape image circle square thing line box dot ring star".split()]
RED, BLUE = (Image.new("RGB", (60, 40), color) for color in ("red", "blue"))
TILES = 4


@pytest.fixture
def nano() -> ChatModel:
    return ChatModel.load(dtype="float32")


@pytest.fixture
def tiles(nano: ChatModel) -> Iterator[list[int]]:
    """How many tiles each call of the tower encodes that no question guides."""
    calls: list[int] = []

    def count(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args) == 1:
            calls.append(len(args[0]))

    handle = nano.model.model.vision_tower.register_forward_pre_hook(count)
    yield calls
    handle.remove()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_ten_questions_encode_four_tiles_once(nano: ChatModel, tiles: list[int], batch_size: int, tmp_path: Path):
    RED.save(tmp_path / "red.png")
    records = [{"image": str(tmp_path / "red.png"), "question": question} for question in QUESTIONS]
    settings = {"batch_size": batch_size, "max_new_tokens": 8, "progress": False}
    answers = batch_generate(records, nano, **settings)
    assert tiles == [TILES]
    assert answers == batch_generate(records, replace(nano, image_cache=ImageFeatureCache(0)), **settings)


def test_batches_with_and_without_images(nano: ChatModel, tiles: list[int]):
    images = [RED, None, BLUE, RED.copy(), None, BLUE]
    records = [
        {"question": question} | ({} if image is None else {"image": image})
        for question, image in zip(QUESTIONS, images, strict=False)
    ]
    answers = batch_generate(records, nano, batch_size=6, max_new_tokens=8, progress=False)
    assert tiles == [TILES] * 3  # red, blue and the grey of those without
    alone = [batch_generate([record], nano, max_new_tokens=8, progress=False)[0] for record in records]
    assert [each["answer"] for each in answers] == [each["answer"] for each in alone]


def test_an_image_is_told_by_what_the_tower_reads(nano: ChatModel, tiles: list[int]):
    palette = RED.convert("P", palette=Image.Palette.ADAPTIVE)
    other = BLUE.convert("P", palette=Image.Palette.ADAPTIVE)
    assert palette.tobytes() == other.tobytes()
    features = nano.encode_images([palette, other, RED])
    assert not torch.equal(features[0].global_features, features[1].global_features)
    assert features[0] is features[2]
    nano.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert not torch.equal(nano.encode_image(RED).overview, features[2].overview)


def test_another_model_shares_nothing(nano: ChatModel, tiles: list[int]):
    """Each change of the tower has features of its own, which are those without a cache."""

    def check(is_known: bool) -> torch.Tensor:
        tiles.clear()
        features = nano.encode_image(RED, 16)
        assert (tiles == []) == is_known
        (expected,) = nano.encode_tiles(nano.preprocess([RED]), 16)
        assert torch.equal(features.global_features, expected.global_features)
        assert features.global_features.dtype == nano.model.dtype
        return features.global_features

    model = nano.model.model
    first = check(is_known=False)
    check(is_known=True)
    with torch.no_grad():
        model.vision_projector.linear_1.weight.mul_(0.5)
    assert not torch.equal(check(is_known=False), first)
    layer = model.vision_tower.layers[0].mlp.fc1
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight))
    check(is_known=False)
    nano.model.bfloat16()
    check(is_known=False)
    nano.model.float()
    check(is_known=False)
    check(is_known=True)
    other = replace(nano, model=tiny_model(nano.model.config))  # which has the same cache
    (expected,) = other.encode_tiles(other.preprocess([RED]), 16)
    assert torch.equal(other.encode_image(RED, 16).global_features, expected.global_features)


def test_adapters_are_told_apart(nano: ChatModel, tiles: list[int]):
    def state() -> EncoderState:
        return EncoderState.of(nano.model, nano.processor)

    before = state()
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"], init_lora_weights=False), nano.model.model.vision_tower)
    layer = nano.model.model.vision_tower.layers[0].mlp.fc1
    states = [before, state()]
    assert state() == states[-1]
    layer.enable_adapters(False)
    states.append(state())
    layer.enable_adapters(True)
    layer.set_scale("default", 3.0)
    states.append(state())
    layer.merge()  # writes to `weight.data`
    states.append(state())
    assert all(one != other for index, one in enumerate(states) for other in states[:index])


def test_weights_of_inference_mode(nano: ChatModel):
    with torch.inference_mode():
        model = tiny_model(tiny_config(text={"vocab_size": nano.model.config.text_config.vocab_size}))
    assert EncoderState.of(model, nano.processor) == EncoderState.of(model, nano.processor)
