"""Attention implementations: the same numbers from each, for both parts or one, with padding and without."""

from itertools import product
from typing import Any

import pytest
import torch
from tests.helpers.flash import FlashStandIn
from tests.helpers.tiny import Sample, make_inputs, tiny_config, tiny_model
from transformers import AttentionInterface, modeling_utils
from transformers.integrations.flash_attention import flash_attention_forward

from fusion_hf import CompiledGenerator, FusionForConditionalGeneration

SAMPLES = [Sample([5], seed=1), Sample([4, 7], [3], seed=2), Sample([6], image=False, seed=3)]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
# relative errors of all logits: of one function in float32, and of rounding to bfloat16
EXACT, ROUNDED = 1e-5, 0.05
FLASH = "flash"  # stands for the stand-in's name in parameters
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", FLASH)
# flex attention is compiled for each part: one pair is enough of it to notice a fault
PAIRS = [
    pytest.param(*pair, marks=pytest.mark.slow if set(pair) == {"flex_attention", "eager"} else ())
    for pair in product(IMPLEMENTATIONS, repeat=2)
]


@pytest.fixture
def llama() -> FusionForConditionalGeneration:
    return tiny_model(tiny_config())


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashStandIn:
    """One that also takes float32, so that nothing but the implementation differs."""
    stand_in = FlashStandIn(dtypes=(torch.float32,))
    stand_in.install(monkeypatch)
    return stand_in


def logits_of(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].float()


def error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values - expected).norm() / expected.norm()).item()


def use(model: FusionForConditionalGeneration, vision: str, text: str) -> None:
    names = ["flash_stand_in" if name == FLASH else name for name in (vision, text)]
    one = names[0] == names[1]
    model.set_attn_implementation(names[0] if one else {"vision_config": names[0], "text_config": names[1]})
    assert model.model.vision_tower.config._attn_implementation == names[0]
    assert model.model.language_model.config._attn_implementation == names[1]


@pytest.mark.parametrize(("vision", "text"), PAIRS)
def test_all_implementations_agree(
    llama: FusionForConditionalGeneration, flash: FlashStandIn, vision: str, text: str
) -> None:
    batches = {side: make_inputs(llama.config, SAMPLES, padding_side=side) for side in ("left", "right")}
    use(llama, "eager", "eager")
    expected = {side: logits_of(llama, batch) for side, batch in batches.items()}
    use(llama, vision, text)
    for side, batch in batches.items():
        assert error(logits_of(llama, batch), expected[side]) < EXACT, side
    assert bool(flash.packed) == (FLASH in (vision, text))


def test_padding_never_reaches_flash_attention(llama: FusionForConditionalGeneration, flash: FlashStandIn) -> None:
    inputs = make_inputs(llama.config, SAMPLES)
    use(llama, FLASH, FLASH)
    logits_of(llama, inputs)
    config, batch = llama.config, len(SAMPLES)
    patches = config.num_patches_per_side**2
    words = int((inputs["instruct_input_ids"] != config.instruct_pad_token_id).sum())
    tokens = int(inputs["attention_mask"].sum())
    guided, read = batch * patches + words, tokens
    layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    assert flash.packed == [(guided, guided)] * layers[0] + [(read, read)] * layers[1]
    # tiles have no padding: those of an image are one call
    assert flash.whole == [(4, patches)] * layers[0] * batch


def test_without_padding_nothing_is_packed(llama: FusionForConditionalGeneration, flash: FlashStandIn) -> None:
    inputs = make_inputs(llama.config, SAMPLES[:1])
    expected = logits_of(llama, inputs)
    use(llama, FLASH, FLASH)
    assert error(logits_of(llama, inputs), expected) < EXACT
    assert flash.packed == []


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generation_with_flash_attention(
    llama: FusionForConditionalGeneration, flash: FlashStandIn, options: dict[str, Any]
) -> None:
    inputs = make_inputs(llama.config, SAMPLES, padding_side="left")
    expected = llama.generate(**inputs, **GREEDY, **options)
    use(llama, FLASH, FLASH)
    torch.testing.assert_close(llama.generate(**inputs, **GREEDY, **options), expected)
    assert flash.packed


@pytest.mark.parametrize("vision", ["sdpa", FLASH])
def test_static_cache_with_flash_attention(
    llama: FusionForConditionalGeneration, flash: FlashStandIn, vision: str
) -> None:
    """Its unused places must not be read, with padding and without, whatever the tower uses."""
    use(llama, "sdpa", "sdpa")
    options = {"cache_implementation": "static", "disable_compile": True}
    batches = [make_inputs(llama.config, samples, padding_side="left") for samples in (SAMPLES[:1], SAMPLES)]
    expected = [llama.generate(**batch, **GREEDY) for batch in batches]
    use(llama, vision, FLASH)
    for batch, ids in zip(batches, expected, strict=True):
        torch.testing.assert_close(llama.generate(**batch, **GREEDY, **options), ids)


def test_bfloat16_is_what_flash_attention_is_given(
    llama: FusionForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = FlashStandIn()
    stand_in.install(monkeypatch)
    inputs = make_inputs(llama.config, SAMPLES)
    expected = logits_of(llama, inputs)
    half = llama.to(torch.bfloat16)
    use(half, FLASH, FLASH)
    assert error(logits_of(half, inputs), expected) < ROUNDED
    assert stand_in.packed and stand_in.whole


def test_gradients_through_flash_attention(llama: FusionForConditionalGeneration, flash: FlashStandIn) -> None:
    inputs = make_inputs(llama.config, SAMPLES)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= llama.config.image_token_id, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for name in ("eager", FLASH):
        use(llama, name, name)
        llama.zero_grad()
        llama(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in llama.parameters()]))
    assert error(gradients[1], gradients[0]) < EXACT


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "no_such_attention"])
def test_what_is_not_here_is_named_with_what_is(llama: FusionForConditionalGeneration, name: str) -> None:
    message = f"attn_implementation.*'eager', 'sdpa', 'flex_attention'.* got '{name}'"
    for given in (name, {"text_config": name}, {"vision_config": name}):
        with pytest.raises((ImportError, ValueError), match=message):
            llama.set_attn_implementation(given)
        with pytest.raises((ImportError, ValueError), match=message):
            FusionForConditionalGeneration._from_config(tiny_config(), attn_implementation=given)
    assert llama.config._attn_implementation == "sdpa"


def test_a_kernel_of_the_hub_stands_for_a_missing_package(
    llama: FusionForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers, where the library `kernels` is installed; what is fetched is left out here."""

    def fetch(name: str, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_attention_forward)

    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", fetch)
    llama.set_attn_implementation("flash_attention_2")
    for part in (llama.model.language_model, llama.model.vision_tower):
        assert part.config._attn_implementation.startswith("kernels-community/")


@pytest.mark.parametrize(("vision", "text", "compile_prompt"), [("sdpa", FLASH, False), (FLASH, "sdpa", True)])
def test_flash_attention_is_not_compiled(
    llama: FusionForConditionalGeneration, flash: FlashStandIn, vision: str, text: str, compile_prompt: bool
) -> None:
    """Taking padding out has shapes that depend on values."""
    use(llama, vision, text)
    with pytest.raises(ValueError, match=r"attn_implementation.*'eager', 'sdpa', 'flex_.*got 'flash_stand_in'"):
        CompiledGenerator(llama, [64], 8, compile_prompt=compile_prompt)
