"""What quantization leaves alone: declared by the model, unless the user's configuration says it."""

import subprocess
import sys

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from fusion_hf import FusionForConditionalGeneration, nano_path
from fusion_hf.model.quantization_fusion import NOT_QUANTIZED, name_extra, skip_by_default

# fails once for each library, as if none were installed, and prints the errors' last lines
WITHOUT_LIBRARIES = """
import sys
sys.modules["bitsandbytes"] = sys.modules["torchao"] = None
from fusion_hf import FusionForConditionalGeneration, nano_path
for config in ({"quant_method": "bitsandbytes", "load_in_8bit": True},
               {"quant_method": "bitsandbytes", "load_in_4bit": True},
               {"quant_method": "torchao", "quant_type": {"default": {}}}):
    try:
        FusionForConditionalGeneration.from_pretrained(nano_path(), quantization_config=config)
    except ImportError as error:
        print(config["quant_method"] in str(error), str(error).splitlines()[-1])
"""


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


@pytest.mark.parametrize("given", ["int8", 8, torch.int8])
def test_what_is_no_configuration_is_refused(given):
    with pytest.raises(ValueError, match=rf"quantization_config.*.*BitsAndBytesConfig.*got {given!r}"):
        FusionForConditionalGeneration.from_pretrained(nano_path(), quantization_config=given)


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"got nonsense - supported types are: .*'torchao'"):
        FusionForConditionalGeneration.from_pretrained(nano_path(), quantization_config={"quant_method": "nonsense"})


def test_a_missing_library_names_the_extra():
    command = [sys.executable, "-c", WITHOUT_LIBRARIES]
    printed = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()
    assert printed == ['True For quantization, run `pip install "fusion_hf[quant]"`.'] * 3


def test_other_missing_modules_are_no_matter_of_the_extra():
    with pytest.raises(ImportError, match=r"^No module named 'flash_attn'$"), name_extra():
        raise ImportError("No module named 'flash_attn'")
