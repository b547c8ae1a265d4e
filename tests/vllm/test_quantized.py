"""Quantized folders in vLLM answer as they do in transformers, also where they leave some layers alone."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.vllm_models import CASES, Reference, largest_difference, save_model, write_random_model

from fusion_hf import FusionForConditionalGeneration, FusionProcessor

pytestmark = pytest.mark.vllm
LAYERS = "model.language_model.layers"
LINEAR = re.compile(rf"{LAYERS}\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
# by their names in the folder: a layer of its own, and three that are one in vLLM
LEFT_ALONE = [f"{LAYERS}.0.mlp.down_proj", *(f"{LAYERS}.1.self_attn.{name}_proj" for name in "qkv")]
GROUP = 32  # weights of a row with one scale, of 4 bits
TOP = 20  # log-probabilities that are compared; vLLM's most


def compress(folder: Path, output: Path, bits: int) -> None:
    """
    A copy of a folder in compressed-tensors' format, as llm-compressor leaves one.

    bits: 8, with inputs in 8 bits too, or 4, of the weights alone.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    shutil.copytree(folder, output)
    weights, ignored = {}, []
    for name, weight in load_file(output / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if LINEAR.fullmatch(name) is None or module in LEFT_ALONE:
            weights[name] = weight
            ignored.append(module)
            continue
        groups = weight.unflatten(1, (-1, GROUP if bits == 4 else weight.shape[1]))  # (N, K / G, G)
        most = 2 ** (bits - 1) - 1
        scales = groups.abs().amax(2, keepdim=True) / most
        rounded = (groups / scales).round().clamp(-most, most).flatten(1).to(torch.int8)
        weights[f"{name}_scale"] = scales[..., 0].contiguous()
        if bits == 4:
            weights[f"{name}_packed"] = pack_to_int32(rounded, bits)
            weights[f"{name}_shape"] = torch.tensor(weight.shape)
        else:
            weights[name] = rounded
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _scheme(bits, ignored)
    (output / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _scheme(bits: int, ignore: list[str]) -> dict[str, Any]:
    integers = {"num_bits": bits, "type": "int", "symmetric": True}
    weights = {"strategy": "group", "group_size": GROUP} if bits == 4 else {"strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": integers | weights | {"dynamic": False}}
    if bits == 8:
        group["input_activations"] = integers | {"strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if bits == 4 else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def first_token_difference(reference: Reference, engine: Any) -> float:
    """The largest difference of the log-probabilities of transformers' first tokens."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1, logprobs=TOP, detokenize=False)
    outputs = engine.generate([reference.prompt(case) for case in CASES], settings, use_tqdm=False)
    differences = []
    for case, output in zip(CASES, outputs, strict=True):
        answer = reference.answer(replace(case, max_tokens=1))
        (step,) = output.outputs[0].logprobs
        differences.append(abs(step[answer.ids[0]].logprob - answer.logprobs[0]))
    return max(differences)


# vLLM's kernel of 4 bits on a CPU has no float32; one of 8 bits rounds inputs, where a last bit may fall either way
@pytest.mark.parametrize(("backbone", "bits", "dtype"), [("llama", 8, "float32"), ("qwen3", 4, "bfloat16")])
def test_compressed_tensors(load, tmp_path, backbone, bits, dtype):
    original = write_random_model(tmp_path / "original", backbone)
    compress(original, tmp_path / "compressed", bits)
    engine = load(tmp_path / "compressed", dtype=dtype)
    assert first_token_difference(Reference(tmp_path / "compressed"), engine) < 0.02
    if bits == 4:  # roundings that are seen
        assert first_token_difference(Reference(original), engine) > 0.02


def test_a_folder_that_was_saved_with_torchao(load, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    original = write_random_model(tmp_path / "original", "llama")
    quantized = FusionForConditionalGeneration.from_pretrained(
        original, dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    save_model(tmp_path / "quantized", quantized, FusionProcessor.from_pretrained(original))
    engine = load(tmp_path / "quantized")
    assert largest_difference(Reference(tmp_path / "quantized"), engine) < 1e-4
    assert largest_difference(Reference(original), engine) > 1e-4
