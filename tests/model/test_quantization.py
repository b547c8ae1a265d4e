"""What quantization leaves alone: declared by the model, unless the user's configuration says it."""

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from fusion_hf import FusionForConditionalGeneration, nano_path
from fusion_hf.configuration_fusion import NOT_QUANTIZED, skip_by_default


@pytest.fixture(scope="module")
def linear_layers():
    model = FusionForConditionalGeneration.from_pretrained(nano_path())
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def test_the_language_models_layers_are_quantized_and_nothing_else(linear_layers):
    quantized = [name for name in linear_layers if should_convert_module(name, NOT_QUANTIZED)]
    assert quantized
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    rest = set(linear_layers) - set(quantized)
    assert "lm_head" in rest
    parts = ("vision_tower", "vision_projector", "vision_projector_back", "vision_sampler")
    assert all(any(f".{part}." in name for part in parts) for name in rest - {"lm_head"})
    assert all(any(f".{part}." in name for name in rest) for part in parts)


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_configuration_without_such_a_list_gets_it(as_dict):
    given = BitsAndBytesConfig(load_in_8bit=True)
    config = skip_by_default(given.to_dict() if as_dict else given)
    assert config.llm_int8_skip_modules == list(NOT_QUANTIZED)
    assert config.load_in_8bit and given.llm_int8_skip_modules is None


def test_the_users_list_stays():
    given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert skip_by_default(given).llm_int8_skip_modules == ["lm_head"]


def test_from_pretrained_uses_it(monkeypatch):
    """Whatever the quantizer needs of the machine, it is asked with the list."""

    def stop(*args, quantization_config, **kwargs):
        raise StopIteration(quantization_config.llm_int8_skip_modules)

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", stop)
    with pytest.raises(StopIteration) as stopped:
        FusionForConditionalGeneration.from_pretrained(
            nano_path(), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
    assert stopped.value.value == list(NOT_QUANTIZED)
