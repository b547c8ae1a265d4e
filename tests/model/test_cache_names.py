"""transformers 5.24 calls the key-value cache `cache`, older releases `past_key_values`: both names work on all."""

import logging
from typing import Any

import pytest
import torch
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.model.compatibility_fusion import CACHE_NAMES
from fusion_hf.model.modeling_fusion_base import CACHE_NAME

# where transformers has the newer name
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

GREEDY = {"do_sample": False, "return_dict_in_generate": True}
PROMPT, ANSWER = 4, 4  # new tokens of the first and of the second call


@pytest.fixture(scope="module")
def model() -> FusionForConditionalGeneration:
    return tiny_model(tiny_config())


@pytest.fixture
def inputs(model: FusionForConditionalGeneration) -> dict[str, Any]:
    return make_inputs(model.config, [Sample([5], seed=1)])


@pytest.fixture
def deprecations():
    """What transformers' logger says about deprecated names."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    type(transformers_logging.get_logger()).warning_once.cache_clear()
    logger.addHandler(handler)
    yield lambda: [message for message in said if "deprecated" in message]
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_forward_takes_and_returns_a_cache_under_both_names(backbone: str, name: str, deprecations) -> None:
    model = tiny_model(tiny_config(backbone))
    inputs = make_inputs(model.config, [Sample([5], seed=1)])
    whole = inputs["input_ids"]
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        first = model(**inputs, **{name: cache}, use_cache=True)
        assert first[CACHE_NAME] is cache and cache.get_seq_length() == whole.shape[1]
        token = first.logits[:, -1:].argmax(-1)
        second = model(input_ids=token, **{name: cache}, use_cache=True)
        expected = model(**inputs | {"input_ids": torch.cat([whole, token], 1), "attention_mask": None})
    torch.testing.assert_close(second.logits[:, -1], expected.logits[:, -1])
    assert deprecations() == []
    assert first.past_key_values is cache  # what callers of older releases read


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_continues_a_cache_under_both_names(
    model: FusionForConditionalGeneration, inputs: dict[str, Any], name: str, deprecations
) -> None:
    expected = model.generate(**inputs, **GREEDY, max_new_tokens=PROMPT + ANSWER).sequences
    cache = DynamicCache(config=model.config.text_config)
    begun = model.generate(**inputs, **GREEDY, max_new_tokens=PROMPT, **{name: cache})
    assert getattr(begun, CACHE_NAME) is cache
    continued = inputs | {"input_ids": begun.sequences, "attention_mask": torch.ones_like(begun.sequences)}
    ended = model.generate(**continued, **GREEDY, max_new_tokens=ANSWER, **{name: cache})
    assert ended.sequences.tolist() == expected.tolist()
    assert deprecations() == []


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_older_name_warns_where_transformers_has_the_newer_one(
    model: FusionForConditionalGeneration, inputs: dict[str, Any], name: str, recwarn: pytest.WarningsRecorder
) -> None:
    model(**inputs, **{name: DynamicCache(config=model.config.text_config)})
    warned = [str(warning.message) for warning in recwarn if warning.category is FutureWarning]
    assert len(warned) == int(name != CACHE_NAME == "cache")


def test_assisted_generation_equals_greedy(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    expected = model.generate(**inputs, **GREEDY, max_new_tokens=8).sequences
    assistant = tiny_model(tiny_config(), seed=1)
    assert model.generate(**inputs, **GREEDY, max_new_tokens=8, assistant_model=assistant).sequences.tolist() == (
        expected.tolist()
    )


@pytest.mark.parametrize("call", ["forward", "generate", "prepare_inputs_for_generation"])
def test_both_names_at_once_are_refused(
    model: FusionForConditionalGeneration, inputs: dict[str, Any], call: str
) -> None:
    caches = {name: DynamicCache(config=model.config.text_config) for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="`cache` and `past_key_values`"):
        getattr(model, call)(**inputs, **caches)


def test_tuples_have_loss_and_logits_first(model: FusionForConditionalGeneration, inputs: dict[str, Any]) -> None:
    """As those of every causal model, which is what trainers count on."""
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= model.config.image_token_id, -100)
    expected = model(**inputs, labels=labels)
    loss, logits, *_ = model(**inputs, labels=labels, return_dict=False)
    assert loss == expected.loss and torch.equal(logits, expected.logits)
    kept = [name for name in expected if name not in (*model.config.keys_to_ignore_at_inference, "loss")]
    assert kept == ["logits"]


def test_image_outputs_are_those_of_get_image_features(
    model: FusionForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    model.set_attn_implementation("eager")
    questions = {name: inputs[name] for name in ("instruct_input_ids", "instruct_attention_mask")}
    recorded = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        image_outputs = model(**inputs, **recorded).image_outputs
        plain = model(**inputs).image_outputs
        expected = model.get_image_features(inputs["pixel_values"], **questions, **recorded)
    model.set_attn_implementation("sdpa")
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(image_outputs[name], expected[name]) and torch.equal(plain[name], expected[name])
    for name in ("hidden_states", "attentions"):
        assert plain.get(name) is None and len(image_outputs[name]) == len(expected[name]) > 0
        assert all(torch.equal(*pair) for pair in zip(image_outputs[name], expected[name], strict=True))


def test_prompts_without_an_image_have_no_image_outputs(model: FusionForConditionalGeneration) -> None:
    inputs = make_inputs(model.config, [Sample([5], image=False)])
    assert model(**inputs).image_outputs is None
