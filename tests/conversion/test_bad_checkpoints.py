"""A broken or hostile checkpoint is refused in one line that names what is wrong; nothing is written."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.checkpoints import (
    TOWER,
    TOWER_PREFIX,
    adapter_shapes,
    random_tensors,
    save_weights,
    upstream_config,
    write_checkpoint,
    write_json,
)

from fusion_hf.cli.convert import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refuse(tmp_path, capsys):
    """Runs the command, checks that it fails cleanly, and returns its one line."""

    def run(*extra: str) -> str:
        before = sorted(tmp_path.iterdir())
        arguments = ["--model", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "output")]
        if "--vision-config" not in extra:
            arguments += ["--vision-config", str(tmp_path / "vision_config.json")]
        assert main([*arguments, *extra]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and captured.out == ""
        assert sorted(tmp_path.iterdir()) == before
        return lines[0]

    return run


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_missing_shard(tmp_path, refuse, suffix):
    write_checkpoint(tmp_path / "checkpoint", num_shards=3, suffix=suffix)
    shard = next((tmp_path / "checkpoint").glob(f"*-00002-of-00003{suffix}"))
    shard.unlink()
    error = refuse()
    assert shard.name in error and "index.json" in error


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_shard(tmp_path, refuse, suffix, kept):
    write_checkpoint(tmp_path / "checkpoint", num_shards=3, suffix=suffix)
    shard = next((tmp_path / "checkpoint").glob(f"*-00002-of-00003{suffix}"))
    os.truncate(shard, int(shard.stat().st_size * kept))
    error = refuse()
    assert shard.name in error and ("truncated" in error or "not a weights file" in error)


def test_shard_that_lacks_a_tensor_of_its_index(tmp_path, refuse):
    write_checkpoint(tmp_path / "checkpoint", num_shards=2)
    shard = tmp_path / "checkpoint" / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    lost = sorted(tensors)[3]
    del tensors[lost]
    save_file(tensors, shard)
    assert lost in refuse()


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3, "a\\b"])
def test_index_that_leaves_the_folder(tmp_path, refuse, shard):
    tensors = write_checkpoint(tmp_path / "checkpoint", num_shards=2)
    save_file(tensors, tmp_path / "outside.safetensors")
    index = tmp_path / "checkpoint" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], shard)
    index.write_text(json.dumps(content))
    error = refuse()
    assert repr(shard) in error and "same folder" in error


def test_every_difference_is_listed_at_once(tmp_path, refuse):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    extra = ["model.image_newline", "model.layers.9.mlp.down_proj.weight", "something.else"]
    extra.append("model.vision_sampler_layers.7.layers.0.proj_in.weight")
    missing = ["model.norm.weight", "model.mm_projector.2.bias", f"{TOWER_PREFIX}encoder.layers.1.mlp.fc1.weight"]
    for key in extra:
        tensors[key] = torch.zeros(2)
    for key in missing:
        del tensors[key]
    tensors["lm_head.weight"] = torch.zeros(3, 5)
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(1024).reshape(32, 32).to(torch.int8)
    save_weights(tmp_path / "checkpoint", tensors)
    error = refuse()
    assert all(key in error for key in extra)
    assert "model.language_model.norm.weight" in error and "model.vision_projector.linear_2.bias" in error
    assert "model.vision_tower.layers.1.mlp.fc1.weight" in error
    assert "lm_head.weight has [3, 5] instead of [66, 32]" in error
    assert "model.layers.1.self_attn.o_proj.weight is I8" in error


def test_tensor_in_two_shards(tmp_path, refuse):
    tensors = write_checkpoint(tmp_path / "checkpoint", num_shards=2)
    for shard in (tmp_path / "checkpoint").glob("*.safetensors"):
        save_file(load_file(shard) | {"lm_head.weight": tensors["lm_head.weight"]}, shard)
    assert "lm_head.weight is in both" in refuse()


def test_wrong_tower_by_name(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint")
    assert main(["--model", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "output")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "width 16" in error and "width 1152" in error  # what is there, and what the name stands for
    assert "google/siglip-so400m-patch14-384" in error and "--vision-config" in error
    assert not (tmp_path / "output").exists()


def test_tower_without_a_name(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint", mm_vision_tower=7)
    assert main(["--model", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "output")]) == 2
    assert "`mm_vision_tower` must be the name of a tower, got 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "SigLIP"),
        ("mm_projector_type", "mlp3x_gelu", "'mlp2x_gelu'"),
        ("mm_projector_type", "linear", "'mlp2x_gelu'"),
        ("model_type", "fusion_mpt", "'fusion_phi', 'fusion_llama', 'fusion_qwen', 'fusion_mistral'"),
    ],
)
def test_parts_that_are_not_converted(tmp_path, capsys, field, value, allowed):
    write_checkpoint(tmp_path / "checkpoint", **{field: value})
    assert main(["--model", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "output")]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in (field, repr(value), allowed))


def test_zero_checkpoint(tmp_path, refuse, capsys):
    """Of DeepSpeed: the error has the command that makes one file of it; beside whole weights it does not matter."""
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "global_step120").mkdir()
    sizes = str(tmp_path / "vision_config.json")
    assert main(["--model", str(tmp_path / "checkpoint"), "--vision-config", sizes, "--dry-run"]) == 0
    capsys.readouterr()
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    error = refuse()
    assert "global_step120" in error and "python zero_to_fp32.py . pytorch_model.bin" in error


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 20}, {"num_hidden_layers": 7}, {"num_hidden_layers": 4}, {"patch_size": 7}]
)
def test_wrong_tower_by_size(tmp_path, refuse, changes):
    write_checkpoint(tmp_path / "checkpoint")
    path = write_json(tmp_path / "other.json", TOWER | changes)
    error = refuse("--vision-config", str(path))
    assert "The tower does not fit" in error and "other.json" in error


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", json.dumps(TOWER | {"hidden_size": "x"}), json.dumps(TOWER | {"model_type": "clip"})]
)
def test_broken_vision_config(tmp_path, refuse, content):
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "other.json").write_text(content)
    assert "other.json" in refuse("--vision-config", str(tmp_path / "other.json"))


class Bomb:
    """Would create a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin", "non_lora_trainables.bin"])
def test_code_in_a_bin_file(tmp_path, refuse, zipped, name):
    write_checkpoint(tmp_path / "base")
    write_json(tmp_path / "checkpoint" / "config.json", upstream_config())
    if name == "non_lora_trainables.bin":
        write_json(tmp_path / "checkpoint" / "adapter_config.json", {"lora_alpha": 1})
        factors = {f"base_model.model.model.layers.0.mlp.down_proj.lora_{f}.weight": torch.ones(1, 1) for f in "AB"}
        save_file(factors, tmp_path / "checkpoint" / "adapter_model.safetensors")
    file, trace = tmp_path / "checkpoint" / name, tmp_path / "trace"
    content = {"model.norm.weight": Bomb(trace)}
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    error = refuse(*([] if name == "pytorch_model.bin" else ["--base", str(tmp_path / "base")]))
    assert name in error and "was not loaded" in error and not trace.exists()


def test_bin_file_with_other_things_than_tensors(tmp_path, refuse):
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    torch.save({"epoch": 3, "model.norm.weight": torch.ones(3)}, tmp_path / "checkpoint" / "pytorch_model.bin")
    assert "epoch" in refuse()
    torch.save([torch.ones(3)], tmp_path / "checkpoint" / "pytorch_model.bin")
    assert "list" in refuse()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llava"}, "'llava'"),
        ({"model_type": None}, "None"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 31}, "config.json"),
        ({"intermediate_size": 10**18}, "configuration"),
        ({"num_hidden_layers": 10**9}, "1000000000"),
        ({"window_size": 0}, "window_size"),
        ({"window_size": "3"}, "`window_size` = '3'"),
        ({"query_len": "4,x"}, "'4,x'"),
        ({"query_len": "4,5"}, "query_lens"),
        ({"num_of_vision_sampler_layers": 10**9}, "samplers"),
        ({"start_of_vision_sampler_layers": 9}, "sampler_layers"),
        ({"stride_of_vision_sampler_layers": 0}, "stride"),
        ({"rope_scaling": 5}, "config.json"),
    ],
)
def test_impossible_config(tmp_path, refuse, changes, named):
    write_checkpoint(tmp_path / "checkpoint")
    write_json(tmp_path / "checkpoint" / "config.json", upstream_config(**changes))
    assert named in refuse()


def test_plain_language_model_is_no_checkpoint(tmp_path, refuse):
    write_checkpoint(tmp_path / "checkpoint")
    config = upstream_config()
    del config["query_len"], config["window_size"]
    write_json(tmp_path / "checkpoint" / "config.json", config)
    error = refuse()
    assert "query_len" in error and "window_size" in error


def test_folders_without_what_is_needed(tmp_path, refuse):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "vision_config.json").write_text(json.dumps(TOWER))
    assert "config.json does not exist" in refuse()
    write_json(tmp_path / "checkpoint" / "config.json", upstream_config())
    assert "must have weights" in refuse()


def test_base_where_it_belongs(tmp_path, refuse):
    write_checkpoint(tmp_path / "base", "llama")
    write_checkpoint(tmp_path / "checkpoint")
    assert "full checkpoint" in refuse("--base", str(tmp_path / "base"))
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    torch.save(random_tensors(adapter_shapes(upstream_config(), TOWER)), tmp_path / "checkpoint" / "mm_projector.bin")
    assert "adapter-only run" in refuse() and "--base" in refuse()
    error = refuse("--base", str(tmp_path / "base"))
    assert "'fusion_llama'" in error and "'phi3'" in error
    write_json(tmp_path / "checkpoint" / "adapter_config.json", {"lora_alpha": 1})
    assert "LoRA run" in refuse()


def test_frozen_tower_is_asked_for(tmp_path, refuse):
    tensors = write_checkpoint(tmp_path / "checkpoint")
    save_weights(tmp_path / "checkpoint", {k: t for k, t in tensors.items() if not k.startswith(TOWER_PREFIX)})
    error = refuse()
    assert "model.vision_tower.embeddings.patch_embedding.weight" in error and "--vision-config" in error


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_alpha": 8, "use_dora": True}, "use_dora"),
        ({"lora_alpha": 8, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": 8, "alpha_pattern": {"(a+)+$": 2}}, "alpha_pattern"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 8}, "lora_A"),
    ],
)
def test_kinds_of_lora_that_are_no_sum(tmp_path, refuse, settings, named):
    write_checkpoint(tmp_path / "base")
    write_json(tmp_path / "checkpoint" / "config.json", upstream_config())
    write_json(tmp_path / "checkpoint" / "adapter_config.json", settings)
    half = {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(2, 48)}
    save_file(half, tmp_path / "checkpoint" / "adapter_model.safetensors")
    assert named in refuse("--base", str(tmp_path / "base"))


def test_lora_update_without_its_weight(tmp_path, refuse):
    write_checkpoint(tmp_path / "base")
    write_json(tmp_path / "checkpoint" / "config.json", upstream_config())
    write_json(tmp_path / "checkpoint" / "adapter_config.json", {"lora_alpha": 8, "r": 2})
    prefix = "base_model.model.model.layers.0.mlp.gate_proj"
    pair = {f"{prefix}.lora_A.weight": torch.ones(2, 32), f"{prefix}.lora_B.weight": torch.ones(48, 2)}
    save_file(pair, tmp_path / "checkpoint" / "adapter_model.safetensors")
    assert f"{prefix}.lora_A.weight" in refuse("--base", str(tmp_path / "base"))


def test_output_that_exists(tmp_path, refuse):
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").write_text("mine")
    assert "must be a new or an empty folder" in refuse()
    assert (tmp_path / "output" / "precious").read_text() == "mine"


def test_command_line_mistakes(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint")
    checkpoint = ["--model", str(tmp_path / "checkpoint")]
    for arguments, named in (
        ([], "--model"),
        (checkpoint, "--output"),
        ([*checkpoint, "--output", "x", "--dtype", "int4"], "int4"),
        (["--model", str(tmp_path / "nowhere"), "--output", "x"], "nowhere"),
        ([*checkpoint, "--output", str(tmp_path / "x"), "--repo-id", "a/b/c"], "a/b/c"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and named in error


def test_debug_shows_where(tmp_path):
    with pytest.raises(Exception, match="does not exist"):
        (tmp_path / "checkpoint").mkdir()
        main(["--model", str(tmp_path / "checkpoint"), "--dry-run", "--debug"])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_interruption_leaves_no_half_folder(tmp_path, stop):
    """Stopped in the middle of writing, by the user or by the system."""
    write_checkpoint(tmp_path / "checkpoint")
    script = f"""
import signal, time
import fusion_hf.conversion.from_authors as convert
from fusion_hf.cli.convert import main
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait(*args):
    (convert.Path({str(tmp_path)!r}) / "ready").touch()
    time.sleep(600)
convert.write_files = wait
arguments = ["--model", {str(tmp_path / "checkpoint")!r}, "--output", {str(tmp_path / "output")!r}]
raise SystemExit(main([*arguments, "--vision-config", {str(tmp_path / "vision_config.json")!r}]))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (tmp_path / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(stop)
    _, error = process.communicate(timeout=300)
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert not (tmp_path / "output").exists()
    if stop == signal.SIGINT:
        assert "interrupted" in error and "Traceback" not in error
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
