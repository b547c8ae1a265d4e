"""`benchmarks/quantization.py` and the documented snippet, with bitsandbytes and torchao: `make test-quant`."""

import json
from pathlib import Path

import pytest
import torch
from quantization import METHODS, load, main, stored_bytes
from quantization_report import BASE, BNB_4, BNB_8, INT4, INT8
from tests.docs.markdown import fenced_blocks

from fusion_hf import FusionForConditionalGeneration, nano_path

pytestmark = pytest.mark.quant

CPU = torch.device("cpu")
# of the layers' bytes in float32, scales included; int4 of torchao takes a byte for each value on a CPU
MOST = {
    BNB_8: 0.27,
    BNB_4: 0.17,
    INT8: 0.27,
    INT4: 0.40,
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(method: str) -> FusionForConditionalGeneration:
    return load(nano_path(), method, torch.float32, CPU)


def linear_layers(model: FusionForConditionalGeneration) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def is_quantized(layer: torch.nn.Linear) -> bool:
    return type(layer.weight) is not torch.nn.Parameter


def test_layers_take_less_memory(model: FusionForConditionalGeneration, method: str) -> None:
    base = load(nano_path(), BASE, torch.float32, CPU)
    ours, whole = linear_layers(model), linear_layers(base)
    names = [name for name, layer in ours.items() if is_quantized(layer)]
    share = sum(stored_bytes(ours[name]) for name in names) / sum(stored_bytes(whole[name]) for name in names)
    assert 0 < share <= MOST[method], share


def test_the_documented_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = (block for block in fenced_blocks("docs/quantization.md", "py") if "torchao" in block)
    exec(snippet, {})
    assert (tmp_path / "fusion-nano-int8" / "model.safetensors").is_file()


def test_the_benchmark(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    shared = ["--size", "tiny", "--repeats", "1", "--questions", "8", "--threads", "1", "--output", str(output)]
    main(["--only", "times", *shared])
    main(["--only", "accuracy", *shared])
    result = json.loads(output.read_text())
    names = {BASE, *METHODS}
    assert result["accuracy"]["questions"] == 8 and set(result["accuracy"]["right"]) == names
    assert set(result["times"]["bytes"]) == set(result["times"]["ratios"]["per_token_seconds"]) == names
    assert "torchao" in result["times"]["versions"]
