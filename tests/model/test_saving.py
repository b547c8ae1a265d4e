"""Saving and loading: weights to the byte, files complete, data types kept."""

import re
from pathlib import Path

import pytest
import torch
from tests.helpers.tiny import BACKBONES, Sample, make_inputs, tiny_config, tiny_model
from transformers import AutoModelForImageTextToText

import fusion_hf
from fusion_hf import FusionForConditionalGeneration


@pytest.mark.parametrize("backbone", BACKBONES)
def test_save_load_save_is_byte_identical(backbone: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(backbone))
    model.save_pretrained(tmp_path / "first")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "first")
    assert isinstance(reloaded, FusionForConditionalGeneration)
    reloaded.save_pretrained(tmp_path / "second")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert first == second
    assert {"config.json", "model.safetensors", "modeling_fusion.py"} <= first.keys()
    for name in first.keys() - {"config.json", "model.safetensors", "generation_config.json"}:
        code = first[name]
        assert code == (Path(fusion_hf.__file__).parent / "model" / name).read_bytes()
        needed = {f"{module}.py" for module in re.findall(r"^from \.(\w+) import", code.decode(), re.MULTILINE)}
        assert needed <= first.keys(), name
    inputs = make_inputs(model.config, [Sample([4], seed=1), Sample([3, 5], [2], seed=2)])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(tiny_config()).to(dtype).save_pretrained(tmp_path)
    reloaded = FusionForConditionalGeneration.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {dtype}
    wide = FusionForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


def test_tied_head(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("qwen2", text={"tie_word_embeddings": True}))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    reloaded = FusionForConditionalGeneration.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.get_input_embeddings().weight
    torch.testing.assert_close(reloaded.lm_head.weight, model.lm_head.weight)


def test_shards(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    reloaded = FusionForConditionalGeneration.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(reloaded.get_parameter(name), parameter, rtol=0, atol=0)
