"""`--dry-run` checks real-size checkpoints from their headers: these files have holes where the weights would be."""

import json
from pathlib import Path

import pytest
import torch
from tests.helpers.checkpoints import checkpoint_shapes, upstream_config, write_checkpoint, write_json

from fusion_hf.cli.convert import main

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14, "image_size": 384}
GIANT = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40, "patch_size": 16, "image_size": 384}
SAMPLERS = {
    "num_of_vision_sampler_layers": 10,
    "start_of_vision_sampler_layers": 0,
    "stride_of_vision_sampler_layers": 3,
}
PHI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32013,
    "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48},
    **SAMPLERS,
}
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128258,
    **SAMPLERS,
}
MODELS = {
    "FUSION 3B": ("phi", PHI, SO400M, "google/siglip-so400m-patch14-384"),
    "FUSION-X 8B": ("llama", LLAMA, GIANT, "google/siglip2-giant-opt-patch16-384"),
}
NUM_SHARDS = 3


def write_sparse(folder: Path, config: dict, tower: dict[str, int]) -> int:
    """Shards of full size whose data are holes; returns the size of all tensors in bytes."""
    shapes = checkpoint_shapes(config, tower)
    names = sorted(shapes)
    weight_map, total = {}, 0
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        file = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        header, end = {}, 0
        for name in names[shard::NUM_SHARDS]:
            begin, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + end)
        total += end
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_full_size(tmp_path, capsys, name):
    kind, sizes, tower, tower_name = MODELS[name]
    config = upstream_config(kind, mm_vision_tower=tower_name, **sizes)
    num_bytes = write_sparse(tmp_path / "checkpoint", config, tower)
    assert num_bytes > 8 * 10**9
    assert main(["--model", str(tmp_path / "checkpoint"), "--dry-run"]) == 0
    dropped = 2 * tower["hidden_size"]
    assert f"{num_bytes // 2 - dropped:,} parameters in bfloat16, 2 dropped" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_full_size_with_the_other_tower(tmp_path, capsys):
    config = upstream_config("phi", mm_vision_tower="google/siglip2-giant-opt-patch16-384", **PHI)
    write_sparse(tmp_path / "checkpoint", config, SO400M)
    assert main(["--model", str(tmp_path / "checkpoint"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "width 1152, MLP 4304, 26 kept layers, patches of 14, 729 positions" in error
    assert "width 1536, MLP 6144, 39 kept layers, patches of 16, 576 positions" in error


def test_full_size_with_one_wrong_tensor(tmp_path, capsys):
    config = upstream_config("phi", **PHI)
    write_sparse(tmp_path / "checkpoint", config | {"intermediate_size": 8190}, SO400M)
    write_json(tmp_path / "checkpoint" / "config.json", config)
    assert main(["--model", str(tmp_path / "checkpoint"), "--dry-run"]) == 2
    assert (
        "model.layers.31.mlp.gate_up_proj.weight has [16380, 3072] instead of [16384, 3072]" in capsys.readouterr().err
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_writes_nothing(tmp_path, capsys, suffix):
    write_checkpoint(tmp_path / "checkpoint", num_shards=2, suffix=suffix)
    arguments = ["--model", str(tmp_path / "checkpoint"), "--vision-config", str(tmp_path / "vision_config.json")]
    assert main([*arguments, "--output", str(tmp_path / "output"), "--dry-run"]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "output").exists()
