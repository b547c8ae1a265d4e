"""bitsandbytes and torchao, with nothing but the standard `quantization_config`: `make test-quant`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantization import METHODS, load, main, stored_bytes
from quantization_report import BASE, BNB_4, BNB_8, INT4, INT8
from tests.docs.markdown import fenced_blocks

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.configuration_fusion import NOT_QUANTIZED, SKIP_FIELDS
from fusion_hf.inference import Assistant

pytestmark = pytest.mark.quant

IDS = torch.tensor([[20, 21, 22, 23]])
QUESTION, ANSWER = "what color is the shape?", "red"
PICTURE = Path(__file__).parents[2] / "docs" / "assets" / "red_circle.png"
CPU = torch.device("cpu")
# of the layers' bytes in float32, scales included; int4 of torchao takes a byte for each value on a CPU
MOST = {
    BNB_8: 0.27,
    BNB_4: 0.17,
    INT8: 0.27,
    INT4: 0.40,
}
ONLY_THE_FOLDER = """
import json, sys
sys.modules["fusion_hf"] = None  # importing the package fails, as if it were not installed
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
assert "transformers_modules" in type(model).__module__
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""


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


def logits(model: FusionForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_only_the_language_models_layers_are_quantized(model: FusionForConditionalGeneration) -> None:
    base = load(nano_path(), BASE, torch.float32, CPU)
    layers = linear_layers(model)
    assert {name for name, layer in layers.items() if is_quantized(layer)} == {
        name for name in layers if name.startswith("model.language_model.layers.") and "vision_sampler" not in name
    }
    kept = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        if not is_quantized(layers.get(name.removesuffix(".weight"), base.lm_head)):
            assert torch.equal(kept[name], parameter), name


def test_layers_take_less_memory(model: FusionForConditionalGeneration, method: str) -> None:
    base = load(nano_path(), BASE, torch.float32, CPU)
    ours, whole = linear_layers(model), linear_layers(base)
    names = [name for name, layer in ours.items() if is_quantized(layer)]
    share = sum(stored_bytes(ours[name]) for name in names) / sum(stored_bytes(whole[name]) for name in names)
    assert 0 < share <= MOST[method], share


def test_answers(model: FusionForConditionalGeneration) -> None:
    assistant = Assistant(model, FusionProcessor.from_pretrained(nano_path()))
    picture = assistant.open_picture(str(PICTURE))
    assert list(assistant.answer_each(picture, [QUESTION], max_new_tokens=6)) == [ANSWER]


def test_saved_and_loaded_again(model: FusionForConditionalGeneration, tmp_path: Path) -> None:
    """Before it has answered: bitsandbytes rearranges its 4 bits for the CPU when they are first used."""
    model.save_pretrained(tmp_path)
    again = FusionForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert list(NOT_QUANTIZED) in [saved.get(name) for name in SKIP_FIELDS]


def test_a_hub_folder_needs_no_package(model: FusionForConditionalGeneration, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ONLY_THE_FOLDER, str(folder), json.dumps(IDS.tolist())]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    values = torch.tensor(json.loads(result.stdout.splitlines()[-1]))
    torch.testing.assert_close(values, logits(model), rtol=1e-6, atol=1e-6)


def test_the_documented_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = fenced_blocks("docs/inference.md", "py")
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
