"""`build_from_backbones.py`: an untrained FUSION whose backbones keep their weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.helpers.checkpoints import TOWER, write_checkpoint
from tests.helpers.tokenizers import write_phi3_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.cli.build import main

ROOT = Path(__file__).parents[2]
WIDTH, LAYERS = 32, 4
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_TOKENS = 256 + len(SPECIAL)
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def write_tokenizer(folder: Path, special: tuple[str, ...] = SPECIAL) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[-1]).save_pretrained(folder)


def write_text(folder: Path, model_type: str = "llama", spare_rows: int = 0, **changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](vocab_size=NUM_TOKENS + spare_rows, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model.model.state_dict() | {"lm_head.weight": model.lm_head.weight}


def write_vision(folder: Path, whole: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    vision = SiglipVisionConfig(**TOWER)
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
        model = SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text))
        tower = model.vision_model
    else:
        model = tower = SiglipVisionModel(vision)
    model.save_pretrained(folder)
    return tower.state_dict()


@pytest.fixture
def build(tmp_path):
    def run(*extra: str, output: str = "output", status: int = 0) -> dict[str, torch.Tensor]:
        arguments = ["--text", str(tmp_path / "text"), "--vision", str(tmp_path / "vision")]
        arguments += ["--output", str(tmp_path / output), "--num-samplers", "2", "--stride", "2"]
        assert main([*arguments, *extra]) == status
        files = (tmp_path / output).glob("*.safetensors")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    return run


def assert_backbones(weights: dict[str, torch.Tensor], text: dict[str, torch.Tensor], tower: dict[str, torch.Tensor]):
    for name, tensor in text.items():
        ours = name if name.startswith("lm_head") else f"model.language_model.{name}"
        if ours == "lm_head.weight" and ours not in weights:
            continue  # tied
        if tensor.shape == weights[ours].shape:
            assert torch.equal(weights[ours], tensor)
        else:
            kept = tensor[:NUM_TOKENS]
            assert torch.equal(weights[ours][:-2], kept)
            torch.testing.assert_close(weights[ours][-2:], kept.mean(0, keepdim=True).expand(2, -1), rtol=0, atol=1e-6)
    last = f"encoder.layers.{TOWER['num_hidden_layers'] - 1}."
    for name, tensor in tower.items():
        if name.startswith(("embeddings.patch", "embeddings.position", "encoder")) and not name.startswith(last):
            assert torch.equal(weights["model.vision_tower." + name.removeprefix("encoder.")], tensor)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),  # as SmolLM2
        ("qwen2", {"tie_word_embeddings": True, "spare_rows": 13}),
        ("qwen3", {"head_dim": 16}),
        ("smollm3", {"tie_word_embeddings": False}),
        ("mistral", {}),
        ("phi3", {"num_key_value_heads": 4}),
    ],
)
def test_language_models(tmp_path, build, model_type, changes):
    text = write_text(tmp_path / "text", model_type, **changes)
    tower = write_vision(tmp_path / "vision")
    weights = build()
    assert_backbones(weights, text, tower)

    model, info = FusionForConditionalGeneration.from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = model.config
    assert config.text_config.vocab_size == NUM_TOKENS + 2 and config.sampler_layers == [0, 2]
    assert config.vision_config.num_hidden_layers == TOWER["num_hidden_layers"] - 1
    assert config.tie_word_embeddings == bool(changes.get("tie_word_embeddings"))

    processor = FusionProcessor.from_pretrained(tmp_path / "output")
    content = [{"type": "image", "image": Image.new("RGB", (40, 30))}, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        query_len=4,
    )
    output = model.generate(**inputs, query_len=4, max_new_tokens=3)
    assert output.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("whole", [True, False])
def test_towers(tmp_path, build, whole):
    text, tower = write_text(tmp_path / "text"), write_vision(tmp_path / "vision", whole)
    assert_backbones(build(), text, tower)


def test_seed(tmp_path, build):
    write_text(tmp_path / "text")
    write_vision(tmp_path / "vision")
    first, same, other = build(), build(output="same"), build("--seed", "1", output="other")
    sampler = "model.language_model.layers.2.vision_sampler.proj_in.weight"
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first[sampler], other[sampler])
    assert 0.01 < first[sampler].std() < 0.03  # the model's own initialisation
    assert torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_options(tmp_path, build):
    write_text(tmp_path / "text")
    write_vision(tmp_path / "vision")
    weights = build("--query-lens", "4,9", "--window-size", "2", "--start", "1", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert config["query_lens"] == [4, 9] and config["query_len"] == 4 and config["window_size"] == 2
    assert config["sampler_layers"] == [1, 3]
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    card = (tmp_path / "output" / "README.md").read_text()
    assert "**untrained**" in card and "seed 0" in card


def test_without_tokenizer(tmp_path, build):
    text = write_text(tmp_path / "text")
    write_vision(tmp_path / "vision")
    weights = build("--tokenizer", "none")
    assert weights["lm_head.weight"].shape == (NUM_TOKENS + 2, WIDTH)
    assert torch.equal(weights["lm_head.weight"][:-2], text["lm_head.weight"])
    assert not (tmp_path / "output" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--num-samplers", "10"], "10 samplers"),
        (["--start", "3"], "sampler_layers"),
        (["--query-lens", "4,5"], "query_lens"),
        (["--window-size", "0"], "window_size"),
        (["--text", "VISION"], "siglip"),
        (["--vision", "TEXT"], "`model_type` must be 'siglip_vision_model', got 'llama'"),
    ],
)
def test_mistakes(tmp_path, build, capsys, extra, named):
    write_text(tmp_path / "text")
    write_vision(tmp_path / "vision")
    capsys.readouterr()
    folders = {"VISION": str(tmp_path / "vision"), "TEXT": str(tmp_path / "text")}
    build(*(folders.get(argument, argument) for argument in extra), status=2)
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1
    assert not (tmp_path / "output").exists()


def test_tokenizer_without_chat_tokens(tmp_path, build, capsys):
    write_text(tmp_path / "text")
    write_vision(tmp_path / "vision")
    write_tokenizer(tmp_path / "text", ("<a>", "<b>", "<c>"))
    capsys.readouterr()
    build(status=2)
    assert "<|im_end|>" in capsys.readouterr().err


@pytest.mark.slow
def test_scripts(tmp_path):
    """The commands in the scripts' docstrings."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}

    def run(script: str, arguments: str) -> None:
        command = [sys.executable, str(ROOT / "conversion" / script), *arguments.split()]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    write_text(tmp_path / "TEXT")
    write_vision(tmp_path / "VISION")
    run("build_from_backbones.py", "--text TEXT --vision VISION --output BUILT --num-samplers 2 --stride 1")
    assert (tmp_path / "BUILT" / "model.safetensors").is_file()

    write_checkpoint(tmp_path / "CHECKPOINT", vocab_size=32_013)
    write_phi3_tokenizer(tmp_path / "TOKENIZER")
    arguments = "--model CHECKPOINT --vision-config vision_config.json --tokenizer TOKENIZER --output CONVERTED"
    run("convert_fusion_weights_to_hf.py", arguments)
    assert (tmp_path / "CONVERTED" / "chat_template.jinja").is_file()
