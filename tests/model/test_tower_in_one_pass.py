"""Tiles and overviews that run through the tower together, as on GPUs: the numbers of two calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.devices import move
from tests.helpers.flash import FlashStandIn
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model

from fusion_hf import CompiledGenerator, FusionForConditionalGeneration
from fusion_hf.model import modeling_fusion_vision
from fusion_hf.model.modeling_fusion_vision import FusionVisionModel
from fusion_hf.training.gradient_checkpointing import enable_checkpointing

SAMPLES = [Sample([5], seed=1), Sample([4, 7], [3], seed=2), Sample([6], image=False, seed=3)]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
# relative errors of all logits: of one function in float32, and of rounding to half the bits
EXACT, ROUNDED = 1e-5, 0.05
EARLY = ("uniform", "uniform_padded", "masked")


@contextmanager
def together(is_wanted: bool) -> Iterator[None]:
    """All five parts of an image in one pass, or in two, whatever the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionVisionModel, "takes_tiles", lambda tower, pixel_values, asked: is_wanted)
        yield


@contextmanager
def counted(model: FusionForConditionalGeneration) -> Iterator[list[int]]:
    """How many images, tiles included, each call of the tower gets."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tiles = kwargs.get("tiles")
        seen.append(len(args[0]) + (0 if tiles is None else tiles.shape[:2].numel()))

    handle = model.model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def logits_of(model: FusionForConditionalGeneration, inputs: dict[str, Any], is_together: bool) -> torch.Tensor:
    with torch.no_grad(), together(is_together):
        return model(**inputs).logits[inputs["attention_mask"].bool()].float().cpu()


def error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize(
    "attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow), "flash"]
)
def test_logits_are_those_of_two_calls(early: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(early_text_attention=early))
    name = FlashStandIn(dtypes=(torch.float32,)).install(monkeypatch) if attention == "flash" else attention
    model.set_attn_implementation({"vision_config": name})
    for samples in (SAMPLES, SAMPLES[:1]):  # with padding and without
        inputs = make_inputs(model.config, samples)
        expected = logits_of(model, inputs, is_together=False)
        with counted(model) as seen:
            found = logits_of(model, inputs, is_together=True)
        assert error(found, expected) < EXACT
        assert seen == [5 * len(samples)]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_answers_are_those_of_two_calls(backbone: str) -> None:
    model = tiny_model(tiny_config(backbone))
    inputs = make_inputs(model.config, SAMPLES, padding_side="left")
    with together(False):
        expected = model.generate(**inputs, **GREEDY)
    with together(True):
        torch.testing.assert_close(model.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_are_those_of_two_calls(is_checkpointed: bool) -> None:
    gradients = []
    for is_together in (False, True):
        model = tiny_model(tiny_config()).train()
        if is_checkpointed:
            enable_checkpointing(model)
        inputs = make_inputs(model.config, SAMPLES)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= model.config.image_token_id, -100)
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        with together(is_together):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert error(gradients[1], gradients[0]) < EXACT


def test_features_that_are_given_are_not_encoded_again() -> None:
    model = tiny_model(tiny_config())
    inputs = make_inputs(model.config, SAMPLES)
    expected = logits_of(model, inputs, is_together=False)
    features = model.get_global_features(inputs["pixel_values"])
    with counted(model) as seen:
        found = logits_of(model, inputs | {"global_features": features}, is_together=True)
    assert error(found, expected) < EXACT
    assert seen == [len(SAMPLES)]


def test_tiles_that_are_missing_are_named() -> None:
    model = tiny_model(tiny_config())
    inputs = make_inputs(model.config, SAMPLES)
    with together(True), pytest.raises(ValueError, match="pixel_values"):
        model.model.encode_image(inputs["pixel_values"][:, -1:], inputs["instruct_input_ids"], None)


@pytest.mark.slow
def test_a_prompt_is_compiled_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config())
    inputs = make_inputs(model.config, SAMPLES[:2], padding_side="left")
    expected = model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    # what is asked on a GPU is in the graph, too
    monkeypatch.setattr(modeling_fusion_vision, "_is_on_gpu", lambda tensor: True)
    assert model.model.vision_tower.takes_tiles(inputs["pixel_values"], {})
    generator = CompiledGenerator(model, [64], 8, 2, compile_prompt=True, backend="aot_eager")
    torch.testing.assert_close(generator.generate(**inputs, **GREEDY), expected)
    torch._dynamo.reset()


def test_where_it_is_chosen() -> None:
    tower = tiny_model(tiny_config()).model.vision_tower
    pixels = {name: SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda")}
    assert tower.takes_tiles(pixels["cuda"], {})
    assert not tower.takes_tiles(pixels["cpu"], {})
    assert not tower.takes_tiles(pixels["cuda"], {"output_attentions": True})
    assert not tower.takes_tiles(pixels["cuda"], {"output_hidden_states": True})
    handle = tower.layers[-1].register_forward_hook(lambda *args: None)
    assert not tower.takes_tiles(pixels["cuda"], {})
    handle.remove()
    tower.set_attn_implementation("eager")
    assert not tower.takes_tiles(pixels["cuda"], {})


@pytest.mark.gpu
@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_the_numbers_of_a_cpu(early: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = tiny_model(tiny_config(vision={"hidden_size": 64}, early_text_attention=early))
    inputs = make_inputs(model.config, SAMPLES)
    expected = logits_of(model, inputs, is_together=False)
    model.to("cuda", dtype)
    inputs.pop("query_len")
    inputs = move(inputs, "cuda")
    with counted(model) as seen, torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()].float().cpu()
    assert seen == [5 * len(SAMPLES)]
    assert error(logits, expected) < (EXACT if dtype == torch.float32 else ROUNDED)
