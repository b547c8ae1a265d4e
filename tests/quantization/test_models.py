"""fusion-nano quantized by the libraries themselves: what is quantized, what stays, and saving."""

import json
from collections.abc import Callable
from typing import NamedTuple

import pytest
import quantization
import torch
from tests.helpers.hub_folder import run
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from fusion_hf import FusionForConditionalGeneration, batch_generate, nano_path
from fusion_hf.common.errors import InputError
from fusion_hf.inference import ChatModel, question_message
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.model.quantization_fusion import NOT_QUANTIZED

pytestmark = pytest.mark.quant

IMAGE, QUESTION, ANSWER = "docs/assets/red_circle.png", "what color is the shape?", "red"
LONGEST_ANSWER = 4  # tokens
BITSANDBYTES_SKIP, TORCHAO_SKIP = "llm_int8_skip_modules", "modules_to_not_convert"
DTYPES = (torch.float32, torch.bfloat16)

# saves the reloaded model's logits, and prints the type of a quantized weight
RELOAD = """
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__
for parameter in model.parameters():
    if type(parameter) is torch.nn.Parameter:
        parameter.data = parameter.data.clone()  # as `aligned` does
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2], weights_only=True)).logits, sys.argv[3])
print(type(model.model.language_model.layers[0].mlp.up_proj.weight).__name__)
"""


class Method(NamedTuple):
    """`skip_field`: where the configuration names what is left alone. `weight`: the type of a quantized weight."""

    config: Callable[[], QuantizationConfigMixin]
    skip_field: str
    weight: str


METHODS = {
    "bitsandbytes-8bit": Method(lambda: BitsAndBytesConfig(load_in_8bit=True), BITSANDBYTES_SKIP, "Int8Params"),
    "bitsandbytes-4bit": Method(
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), BITSANDBYTES_SKIP, "Params4bit"
    ),
    "torchao-int8": Method(quantization.int8, TORCHAO_SKIP, "Int8Tensor"),
    "torchao-int4": Method(quantization.int4, TORCHAO_SKIP, "IntxUnpackedToInt8Tensor"),
}


class Quantized(NamedTuple):
    method: Method
    dtype: torch.dtype
    model: FusionForConditionalGeneration


@pytest.fixture(scope="module", params=[(name, dtype) for name in METHODS for dtype in DTYPES], ids=str)
def quantized(request: pytest.FixtureRequest) -> Quantized:
    name, dtype = request.param
    method = METHODS[name]
    model = FusionForConditionalGeneration.from_pretrained(
        nano_path(), dtype=dtype, quantization_config=method.config()
    )
    return Quantized(method, dtype, aligned(model.eval()))


@pytest.fixture(scope="module")
def processor() -> FusionProcessor:
    return FusionProcessor.from_pretrained(nano_path())


@pytest.fixture(scope="module")
def plain() -> dict[torch.dtype, FusionForConditionalGeneration]:
    return {dtype: FusionForConditionalGeneration.from_pretrained(nano_path(), dtype=dtype) for dtype in DTYPES}


def aligned(model: FusionForConditionalGeneration) -> FusionForConditionalGeneration:
    """
    The model with its plain weights at addresses that torch chose. Those of a mapped file lie anywhere, and on some
    CPUs (seen on an AMD EPYC) the rounding of a float32 product depends on it, by 7e-6 of fusion-nano's logits.
    """
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()
    return model


def linear_layers_of_the_language_model(model: PreTrainedModel) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and "vision" not in name
    }


def prompt(processor: FusionProcessor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "path": IMAGE}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    return dict(inputs.to("cpu", dtype))


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def test_the_language_models_linear_layers_are_quantized_and_the_rest_is_as_it_was(quantized, plain):
    expected = linear_layers_of_the_language_model(plain[quantized.dtype])
    modules = dict(quantized.model.named_modules())
    found = {
        name for name, parameter in quantized.model.named_parameters() if type(parameter) is not torch.nn.Parameter
    }
    assert found == {f"{name}.weight" for name in expected}
    assert {type(modules[name].weight).__name__ for name in expected} == {quantized.method.weight}
    state = quantized.model.state_dict()
    rest = {name: tensor for name, tensor in plain[quantized.dtype].state_dict().items() if name not in found}
    assert any("vision_sampler" in name for name in rest)
    for name, tensor in rest.items():
        assert state[name].dtype == tensor.dtype == quantized.dtype, name
        assert torch.equal(state[name], tensor), name


def test_quantization_changes_the_weights_and_not_the_answer(quantized, plain, processor):
    inputs = prompt(processor, quantized.dtype)
    assert not torch.equal(logits_of(quantized.model, inputs), logits_of(plain[quantized.dtype], inputs))
    chat_model = ChatModel(quantized.model, processor)
    message = question_message(QUESTION, chat_model.open_image(IMAGE))
    assert chat_model.answer([message], LONGEST_ANSWER) == ANSWER


def test_asking_for_the_state_dict_changes_nothing(quantized, processor):
    """bitsandbytes unpacks its weights for it, on CPUs for which it packs them."""
    inputs = prompt(processor, quantized.dtype)
    before = logits_of(quantized.model, inputs)
    for _ in range(2):
        quantized.model.state_dict()
        assert torch.equal(logits_of(quantized.model, inputs), before)


def test_saved_and_loaded_again_it_computes_the_same(quantized, processor, tmp_path):
    inputs = prompt(processor, quantized.dtype)
    before = logits_of(quantized.model, inputs)
    quantized.model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(quantized.model, inputs), before)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"][quantized.method.skip_field] == list(NOT_QUANTIZED)
    reloaded = FusionForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert reloaded.dtype == quantized.dtype
    assert type(reloaded.model.language_model.layers[0].mlp.up_proj.weight).__name__ == quantized.method.weight
    assert torch.equal(logits_of(aligned(reloaded), inputs), before)


def test_a_folder_without_the_package_computes_the_same(quantized, processor, tmp_path):
    inputs = prompt(processor, quantized.dtype)
    before = logits_of(quantized.model, inputs)
    folder, given, answered = tmp_path / "model", tmp_path / "inputs.pt", tmp_path / "logits.pt"
    quantized.model.save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.save(inputs, given)
    assert run(RELOAD, folder, given, answered, cache=tmp_path) == [quantized.method.weight]
    assert torch.equal(torch.load(answered, weights_only=True), before)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_model_without_its_head_is_quantized_alike(method):
    model = AutoModel.from_pretrained(nano_path(), quantization_config=method.config())
    found = {name for name, parameter in model.named_parameters() if type(parameter) is not torch.nn.Parameter}
    assert found == {f"{name}.weight" for name in linear_layers_of_the_language_model(model)} != set()


def test_what_the_user_names_is_left_alone_instead():
    given = [*NOT_QUANTIZED, r".*\bmlp"]
    model = FusionForConditionalGeneration.from_pretrained(
        nano_path(), quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=given)
    )
    names = [name for name, parameter in model.named_parameters() if type(parameter) is not torch.nn.Parameter]
    assert names and all(".self_attn." in name for name in names)


def test_a_torchao_dict_is_taken_as_its_configuration():
    config = METHODS["torchao-int8"].config().to_dict()
    model = FusionForConditionalGeneration.from_pretrained(nano_path(), quantization_config=config)
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    assert type(model.lm_head.weight) is torch.nn.Parameter


def test_batches_with_an_output_can_be_asked_of_it(quantized, processor, tmp_path):
    """Their log holds a digest of the weights."""
    records = [{"image": IMAGE, "question": QUESTION}] * 3
    chat_model = ChatModel(quantized.model, processor)
    results = batch_generate(records, chat_model, tmp_path / "answers.jsonl", batch_size=2, max_new_tokens=4)
    assert [result["answer"] for result in results] == [ANSWER] * 3


def test_an_assistant_takes_a_quantized_folder_in_its_own_type_alone(quantized, processor, tmp_path):
    quantized.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    name, other = (str(dtype).removeprefix("torch.") for dtype in sorted(DTYPES, key=lambda d: d != quantized.dtype))
    for dtype in ("auto", name):
        chat_model = ChatModel.load(str(tmp_path), device="cpu", dtype=dtype)
        assert chat_model.model.dtype == quantized.dtype
        message = question_message(QUESTION, chat_model.open_image(IMAGE))
        assert chat_model.answer([message], LONGEST_ANSWER) == ANSWER
    with pytest.raises(InputError, match=f"dtype.* one of auto, {name} for this quantized model, got '{other}'"):
        ChatModel.load(str(tmp_path), device="cpu", dtype=other)
