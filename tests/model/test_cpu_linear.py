"""Linear layers by oneDNN: the same answers, and nothing that can be seen but the time."""

import copy
import pickle
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model
from torch import nn

from fusion_hf import FusionForConditionalGeneration, use_onednn
from fusion_hf.inference import ChatModel, cpu_linear
from fusion_hf.inference.cpu_linear import OneDNNLinear, OneDNNSiglipMLP
from fusion_hf.inference.cpu_speed import trial_tensors

pytestmark = pytest.mark.skipif(platform.machine() not in cpu_linear.PROCESSORS, reason="measured on x86-64 alone")

NEW_TOKENS = 6
RELATIVE, ABSOLUTE = 1e-4, 1e-4


@pytest.fixture(autouse=True)
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where single rows are faster by oneDNN, for layers of all sizes."""
    monkeypatch.setattr(cpu_linear, "_rows_are_faster", lambda threads: True)
    monkeypatch.setattr(cpu_linear, "SMALLEST_WEIGHT", 1)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The GELU of each product that oneDNN computes, None for those without."""
    seen: list[str | None] = []
    linear: Callable[..., torch.Tensor] = cpu_linear._linear

    def count(rows: torch.Tensor, weight: torch.Tensor, bias: Any, gelu: str | None = None) -> torch.Tensor:
        seen.append(gelu)
        return linear(rows, weight, bias, gelu)

    monkeypatch.setattr(cpu_linear, "_linear", count)
    return seen


def pair(backbone: str = "llama") -> tuple[FusionForConditionalGeneration, FusionForConditionalGeneration]:
    """A model as it is, and the same with oneDNN."""
    model = tiny_model(tiny_config(backbone))
    other = copy.deepcopy(model)
    use_onednn(other)
    assert any(type(module) is OneDNNLinear for module in other.modules())
    assert any(type(module) is OneDNNSiglipMLP for module in other.modules())
    return model, other


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def is_computed_as_usual(model: nn.Module, other: nn.Module, products: list[str | None]) -> bool:
    """Whether both give the same bits, without oneDNN."""
    inputs = make_inputs(tiny_config(), [Sample()])
    products.clear()
    return torch.equal(logits(model, inputs), logits(other, inputs)) and not products


def test_torch_has_the_operator() -> None:
    """It is not public: where it ends, or takes other arguments, this fails, and models compute as before."""
    rows, weight, bias = trial_tensors(1, torch.float32)
    expected = nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(cpu_linear._linear(rows, weight, bias), expected)
    assert cpu_linear._gelu_agrees()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_answers_and_logits(backbone: str, products: list[str | None]) -> None:
    model, other = pair(backbone)
    inputs = make_inputs(model.config, [Sample([4], seed=1), Sample([3, 5], [2], seed=2)], padding_side="left")
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs), rtol=RELATIVE, atol=ABSOLUTE)
    answers = [each.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False) for each in (model, other)]
    assert answers[0].tolist() == answers[1].tolist()
    assert set(products) == {None, "tanh"}


def test_bfloat16(products: list[str | None]) -> None:
    model = tiny_model(tiny_config()).bfloat16()
    other = copy.deepcopy(model)
    use_onednn(other)
    inputs = make_inputs(model.config, [Sample()])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs), rtol=0.1, atol=0.1)
    assert set(products) == {"tanh"}  # torch gives the other products to oneDNN by itself


def test_files_copies_and_pickles(tmp_path: Path) -> None:
    model, other = pair()
    model.save_pretrained(tmp_path / "usual")
    other.save_pretrained(tmp_path / "onednn")
    usual, onednn = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("usual", "onednn"))
    assert usual == onednn
    reloaded = FusionForConditionalGeneration.from_pretrained(tmp_path / "onednn")
    assert not any(isinstance(module, OneDNNLinear | OneDNNSiglipMLP) for module in reloaded.modules())
    inputs = make_inputs(model.config, [Sample()])
    expected = logits(other, inputs)
    for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):  # noqa: S301
        with torch.no_grad():
            other.lm_head.weight.zero_()  # a copy has weights of its own
        assert torch.equal(logits(again, inputs), expected)


def test_gradients_autocast_and_hooks(products: list[str | None]) -> None:
    model, other = pair()
    inputs = make_inputs(model.config, [Sample()])
    gradients = []
    for each in (model, other):
        each(**inputs).logits.sum().backward()
        gradients.append(each.model.vision_tower.layers[0].mlp.fc1.weight.grad)
    assert torch.equal(*gradients)
    assert not products
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_computed_as_usual(model, other, products)
    seen: list[torch.Tensor] = []
    mlp = other.model.vision_tower.layers[0].mlp
    mlp.fc1.register_forward_hook(lambda layer, given, result: seen.append(result))
    logits(other, inputs)
    assert seen[0].shape[-1] == mlp.fc1.out_features


def test_compiled_and_exported_code_has_no_such_operator(products: list[str | None]) -> None:
    _, other = pair()
    mlp = other.model.vision_tower.layers[0].mlp
    rows = torch.randn(1, 3, mlp.fc1.in_features)
    with torch.no_grad():
        compiled = torch.compile(mlp, backend="eager", fullgraph=True)(rows)
        exported = torch.export.export(mlp, (rows,))
        assert not products
        torch.testing.assert_close(compiled, mlp(rows), rtol=RELATIVE, atol=ABSOLUTE)
    assert "mkldnn" not in str(exported.graph)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_lora(products: list[str | None]) -> None:
    inputs = make_inputs(tiny_config(), [Sample()])
    settings = peft.LoraConfig(target_modules=["fc1", "q_proj"], init_lora_weights=False)
    found = []
    for each in pair():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(each, settings)
        found.append(logits(adapted, inputs))
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(logits(merged, inputs), found[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], found[0], rtol=RELATIVE, atol=ABSOLUTE)


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config())
    before = [type(module) for module in model.modules()]
    with torch.backends.mkldnn.flags(enabled=False):
        use_onednn(model)
    assert [type(module) for module in model.modules()] == before

    def is_gone(*arguments: Any) -> torch.Tensor:
        raise AttributeError("_linear_pointwise")

    monkeypatch.undo()
    monkeypatch.setattr(cpu_linear, "_linear", is_gone)
    for measure in (cpu_linear._rows_are_faster, cpu_linear._gelu_agrees):
        measure.cache_clear()
    use_onednn(model)
    assert [type(module) for module in model.modules()] == before
    for measure in (cpu_linear._rows_are_faster, cpu_linear._gelu_agrees):
        measure.cache_clear()


def test_chat_models_use_it() -> None:
    tower = ChatModel.load(device="cpu").model.model.vision_tower
    assert {type(layer.mlp) for layer in tower.layers} == {OneDNNSiglipMLP}
