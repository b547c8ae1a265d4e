"""Every layout of the authors' checkpoints becomes the same weights under our names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.checkpoints import (
    BAGGAGE,
    LAYERS,
    SAMPLER_LAYERS,
    TOWER,
    TOWER_PREFIX,
    VOCABULARY,
    WIDTH,
    adapter_shapes,
    random_tensors,
    renamed,
    save_weights,
    tower_shapes,
    upstream_config,
    write_checkpoint,
    write_json,
)
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_hf import FusionConfig, FusionForConditionalGeneration
from fusion_hf.conversion.from_authors import convert as run_conversion
from fusion_hf.conversion.inputs import ConversionOptions
from fusion_hf.conversion.upstream_config import convert_config, named_tower
from fusion_hf.hub.publishing import CODE_FOLDER, CODE_PATTERN
from fusion_hf.training.gradient_checkpointing import hide_peft_deprecation

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
RANK, ALPHA = 4, 6


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize("kind", ["phi", "llama", "qwen", "mistral"])
@pytest.mark.parametrize(
    ("num_shards", "suffix"), [(1, ".safetensors"), (3, ".safetensors"), (1, ".bin"), (3, ".bin")]
)
def test_full(tmp_path, convert, kind, num_shards, suffix):
    tensors = write_checkpoint(tmp_path / "checkpoint", kind, num_shards, suffix)
    output = convert()
    assert_same(load_weights(output), renamed(tensors))

    model, info = FusionForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(model.state_dict(), renamed(tensors))


def test_bin_of_the_format_before_zip_files(tmp_path, convert):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    file = tmp_path / "checkpoint" / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert_same(load_weights(convert()), renamed(tensors))


def test_head_and_buffers_are_dropped(tmp_path, convert):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    extra = {f"{TOWER_PREFIX}head.probe": torch.zeros(1, 1, TOWER["hidden_size"])}
    extra[f"{TOWER_PREFIX}embeddings.position_ids"] = torch.zeros(1, 16)
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    extra["model.rotary_emb.inv_freq"] = torch.zeros(4)
    save_weights(tmp_path / "checkpoint", tensors | extra)
    assert_same(load_weights(convert()), renamed(tensors))


def test_default_type_is_that_of_most_weights(tmp_path, convert):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    stored = {k: t if k.startswith("model.mm_projector") else t.to(torch.bfloat16) for k, t in tensors.items()}
    save_weights(tmp_path / "checkpoint", stored)
    output = convert()
    assert_same(load_weights(output), {k: t.to(torch.bfloat16) for k, t in renamed(stored).items()})
    config = json.loads((output / "config.json").read_text())
    parts = (config, config["text_config"], config["vision_config"])
    assert [part["dtype"] for part in parts] == ["bfloat16"] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path, convert, dtype):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    output = convert("--dtype", dtype)
    wanted = getattr(torch, dtype)
    assert_same(load_weights(output), {name: t.to(wanted) for name, t in renamed(tensors).items()})
    assert FusionForConditionalGeneration.from_pretrained(output).dtype == wanted


def test_output_in_shards(tmp_path):
    tensors = write_checkpoint(tmp_path / "checkpoint", num_shards=2)
    output = tmp_path / "output"
    checkpoint, vision = str(tmp_path / "checkpoint"), str(tmp_path / "vision_config.json")
    run_conversion(
        ConversionOptions(checkpoint=checkpoint, vision_config=vision, output=output, max_shard_bytes=50_000)
    )
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in output.glob("*.safetensors"))
    assert len(shards) > 2 and shards == sorted(set(index["weight_map"].values()))
    assert all((output / shard).stat().st_size < 60_000 for shard in shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in renamed(tensors).values())
    assert_same(FusionForConditionalGeneration.from_pretrained(output).state_dict(), renamed(tensors))


def test_same_input_same_bytes(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint", num_shards=2)
    first, second = convert(), convert(output="again/output")
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_folder_is_complete_and_permissions_are_usual(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint")
    output = convert("--tokenizer", "none")
    assert {file.name for file in output.iterdir()} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        *(path.name for path in CODE_FOLDER.glob(CODE_PATTERN)),
    }
    (tmp_path / "plain").mkdir()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "output", "plain", "vision_config.json"]


def test_config(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint")
    output = convert()
    config = FusionConfig.from_pretrained(output)
    assert config.text_config.model_type == "phi3"
    assert config.sampler_layers == SAMPLER_LAYERS
    assert config.query_lens == [4, 16, 36, 64, 144] and config.query_len == 36
    assert config.vision_config.num_hidden_layers == TOWER["num_hidden_layers"] - 1
    assert (config.vision_start_token_id, config.vision_end_token_id) == (VOCABULARY - 2, VOCABULARY - 1)
    assert (config.image_token_id, config.latent_token_id) == (VOCABULARY, VOCABULARY + 1)
    rope = config.text_config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("longrope", 10000.0, 32.0)

    text = (output / "config.json").read_text()
    assert "evil" not in text and "somebody" not in text
    content = json.loads(text)
    left_over = set(BAGGAGE) - {"architectures", "auto_map", "transformers_version", "use_cache"}
    for part in (content, content["text_config"], content["vision_config"]):
        assert not left_over & {name for name, value in part.items() if value}
    assert content["text_config"]["use_cache"] is True
    assert content["architectures"] == ["FusionForConditionalGeneration"]
    assert set(content["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    }


def test_generation_config(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint")
    write_json(tmp_path / "checkpoint" / "generation_config.json", {"eos_token_id": [7, 9], "temperature": 0.1})
    settings = json.loads((convert() / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [7, 9]
    assert settings["suppress_tokens"] == [64, 65, 66, 67]
    assert settings["do_sample"] is False and "temperature" not in settings


def test_fusion_l(tmp_path, convert):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    output = convert("--image-token-grid", "2")
    assert FusionConfig.from_pretrained(output).num_image_tokens == 4
    assert_same(load_weights(output), renamed(tensors))


@pytest.mark.parametrize("name", ["fusion-3b", "fusion-8b", "fusion-x-3b", "fusion-x-8b", "fusion-l-3b"])
def test_published_configs(name):
    """A config of upstream's form, with the published sizes, becomes the family's config file."""
    family = FusionConfig.from_pretrained(CONFIGS / f"{name}.json").to_dict()
    text = dict(family["text_config"])
    rope = dict(text.pop("rope_parameters"))
    upstream = {
        **{name: value for name, value in text.items() if name != "dtype"},
        "model_type": {"phi3": "fusion_phi", "llama": "fusion_llama"}[text["model_type"]],
        "rope_theta": rope.pop("rope_theta"),
        "query_len": "4,16,36,64,144",
        "window_size": 3,
        "num_of_vision_sampler_layers": 10,
        "start_of_vision_sampler_layers": 0,
        "stride_of_vision_sampler_layers": 3,
    }
    if rope["rope_type"] == "longrope":  # as Phi-3.5's published config has it
        rope = {"type": "longrope", "long_factor": rope["long_factor"], "short_factor": rope["short_factor"]}
    upstream["rope_scaling"] = rope
    tower = named_tower(
        "google/siglip2-giant-opt-patch16-384" if "-x-" in name else "google/siglip-so400m-patch14-384"
    )
    converted = convert_config(upstream, tower, image_token_grid=16 if "-l-" in name else None).to_dict()
    for part in (family, family["text_config"], family["vision_config"]):
        part["dtype"] = None
    assert converted == family


# Layouts that need a base


def write_adapter(folder: Path, config: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = random_tensors(adapter_shapes(config, TOWER), seed=1)
    write_json(folder / "config.json", config)
    write_json(folder.parent / "vision_config.json", TOWER)
    return tensors


def write_tower(folder: Path, prefix: str = "vision_model.") -> dict[str, torch.Tensor]:
    """A SigLIP folder with all layers; returns its tensors under upstream's names."""
    tensors = random_tensors(tower_shapes(TOWER, TOWER["num_hidden_layers"]), seed=2)
    write_json(folder / "config.json", {"model_type": "siglip", "vision_config": TOWER})
    save_weights(folder, {prefix + name: tensor for name, tensor in tensors.items()})
    last = f"encoder.layers.{TOWER['num_hidden_layers'] - 1}."
    return {TOWER_PREFIX + name: tensor for name, tensor in tensors.items() if not name.startswith(last)}


def write_llama(folder: Path) -> LlamaForCausalLM:
    """A plain language model, which lacks the two rows of the marks."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY - 2,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def grown(matrix: torch.Tensor) -> torch.Tensor:
    return torch.cat([matrix, matrix.mean(0, keepdim=True).expand(2, -1)])


def test_adapter_only_on_language_model_and_tower(tmp_path, convert):
    adapter = write_adapter(tmp_path / "checkpoint", upstream_config("llama"))
    embedding = torch.randn(VOCABULARY, WIDTH)
    torch.save(adapter | {"model.embed_tokens.weight": embedding}, tmp_path / "checkpoint" / "mm_projector.bin")
    base = write_llama(tmp_path / "base").state_dict()
    tower = write_tower(tmp_path / "tower")
    output = convert("--base", str(tmp_path / "base"), "--vision-config", str(tmp_path / "tower"))

    changed = {"model.embed_tokens.weight": embedding, "lm_head.weight": grown(base["lm_head.weight"])}
    found, expected = load_weights(output), renamed(base | adapter | tower | changed)
    torch.testing.assert_close(found.pop("lm_head.weight"), expected.pop("lm_head.weight"), rtol=0, atol=1e-7)
    assert_same(found, expected)


def test_adapter_only_on_a_full_checkpoint(tmp_path, convert):
    base = write_checkpoint(tmp_path / "base")
    adapter = write_adapter(tmp_path / "checkpoint", upstream_config())
    torch.save(adapter, tmp_path / "checkpoint" / "mm_projector.bin")
    output = convert("--base", str(tmp_path / "base"))
    assert_same(load_weights(output), renamed(base | adapter))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_lora(tmp_path, convert, use_rslora, safe):
    """PEFT merges the same adapter; the base is a plain language model, and the tower was trained whole."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, use_rslora=use_rslora, init_lora_weights=False
    )
    with hide_peft_deprecation():
        model = peft.get_peft_model(write_llama(tmp_path / "base"), settings)
    model.save_pretrained(tmp_path / "checkpoint", safe_serialization=safe)
    if not safe and not (tmp_path / "checkpoint" / "adapter_model.bin").exists():
        file = tmp_path / "checkpoint" / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    merged = model.merge_and_unload().state_dict()

    adapter = write_adapter(tmp_path / "checkpoint", upstream_config("llama"))
    tower = random_tensors(tower_shapes(TOWER, TOWER["num_hidden_layers"] - 1), seed=4)
    whole = adapter | {TOWER_PREFIX + name: tensor for name, tensor in tower.items()}
    prefixed = {f"base_model.model.{key}": tensor for key, tensor in whole.items()}
    torch.save(prefixed, tmp_path / "checkpoint" / "non_lora_trainables.bin")
    output = convert("--base", str(tmp_path / "base"))

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        merged[name] = grown(merged[name])
    expected = renamed(merged | whole)
    found = load_weights(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    card = (output / "README.md").read_text()
    assert f"LoRA updates were added to {len(targets) * LAYERS} weights." in card


def test_lora_of_transposed_weights(tmp_path):
    from fusion_hf.conversion.lora_updates import LoraPair
    from fusion_hf.conversion.stored_tensors import TensorReader, read_headers

    a, b, weight = torch.randn(RANK, 6), torch.randn(5, RANK), torch.randn(6, 5)
    save_weights(tmp_path, {"a": a, "b": b})
    stored = read_headers([tmp_path / "model.safetensors"])
    pair = LoraPair(stored["a"], stored["b"], scale=0.5, transposed=True)
    assert pair.shape == (6, 5)
    torch.testing.assert_close(pair.add_to(weight, TensorReader()), weight + 0.5 * (b @ a).T)


def test_tower_folder_does_not_replace_the_checkpoints_tower(tmp_path, convert):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    write_tower(tmp_path / "tower")
    output = convert("--vision-config", str(tmp_path / "tower"))
    assert_same(load_weights(output), renamed(tensors))


def test_full_checkpoint_without_its_tower(tmp_path, convert):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    without = {key: tensor for key, tensor in tensors.items() if not key.startswith(TOWER_PREFIX)}
    save_weights(tmp_path / "checkpoint", without)
    tower = write_tower(tmp_path / "tower", prefix="")
    output = convert("--vision-config", str(tmp_path / "tower"))
    assert_same(load_weights(output), renamed(without | tower))


def test_full_checkpoint_with_the_tower_that_it_names(tmp_path):
    tower = write_tower(tmp_path / "tower", prefix="")
    tensors = write_checkpoint(tmp_path / "checkpoint", mm_vision_tower=str(tmp_path / "tower"))
    without = {key: tensor for key, tensor in tensors.items() if not key.startswith(TOWER_PREFIX)}
    save_weights(tmp_path / "checkpoint", without)
    run_conversion(ConversionOptions(checkpoint=str(tmp_path / "checkpoint"), output=tmp_path / "output"))
    assert_same(load_weights(tmp_path / "output"), renamed(without | tower))


def test_rope_scaling_of_qwen_is_not_taken_over():
    """The authors' class of it sets that to None; the others do not."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    for kind, rope_type in (("qwen", "default"), ("llama", "linear")):
        config = convert_config(upstream_config(kind, rope_scaling=scaling), named_tower("siglip"), None)
        assert config.text_config.rope_parameters["rope_type"] == rope_type


def test_empty_output_folder_is_used(tmp_path, convert):
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "output").mkdir()
    assert (convert() / "model.safetensors").is_file()


def test_output_keeps_nothing_of_the_input(tmp_path, convert):
    """The result loads after its source is gone."""
    write_checkpoint(tmp_path / "checkpoint")
    output = convert()
    shutil.rmtree(tmp_path / "checkpoint")
    FusionForConditionalGeneration.from_pretrained(output)
    assert str(tmp_path) not in (output / "README.md").read_text()
