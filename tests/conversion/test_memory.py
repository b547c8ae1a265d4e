"""Conversion holds one shard at a time: its peak is at most twice the largest shard above what the process has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers.checkpoints import TOWER, checkpoint_shapes, save_weights, upstream_config, write_json

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 6
MEGABYTE = 2**20
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 5,
    "vocab_size": 2002,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
# Checks first, which imports and builds everything, then forgets the peak so far and converts.
MEASURE = """
import json, re, sys
from pathlib import Path
from fusion_hf.cli.convert import main

def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

assert main([*sys.argv[1:], "--dry-run"]) == 0
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
assert main(sys.argv[1:]) == 0
Path("measured.json").write_text(json.dumps({"peak": memory("VmHWM") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".safetensors", None),
        pytest.param(".safetensors", "bfloat16", marks=pytest.mark.slow),
        pytest.param(".bin", None, marks=pytest.mark.slow),
        pytest.param(".bin", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_peak_memory(tmp_path, suffix, dtype):
    config = upstream_config("llama", **SIZES)
    shapes = checkpoint_shapes(config)
    tensors = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    files = save_weights(tmp_path / "checkpoint", by_size(tensors), NUM_SHARDS, suffix)
    write_json(tmp_path / "checkpoint" / "config.json", config)
    write_json(tmp_path / "vision_config.json", TOWER)
    sizes = [file.stat().st_size for file in files]
    largest = max(sizes)
    assert largest > 40 * MEGABYTE and sum(sizes) > 5 * largest

    arguments = ["--model", "checkpoint", "--vision-config", "vision_config.json", "--output", "output"]
    arguments += ["--dtype", dtype] if dtype else []
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", MEASURE, *arguments], cwd=tmp_path, env=environment, check=True)
    peak = json.loads((tmp_path / "measured.json").read_text())["peak"]
    sys.stdout.write(f"{suffix}: peak {peak / MEGABYTE:.0f} MB, largest shard {largest / MEGABYTE:.0f} MB\n")
    assert peak <= 2 * largest


def by_size(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Largest first: dealt out in turn, they make shards of about the same size."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].numel()))
