"""`benchmarks/inference.py` as users run it: a process with flags, and the file that it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inference import compare, main, turned
from workload import SIZES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "inference.py"
SECONDS = 120


def run(*flags):
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "results" / "tiny.json"
    flags = ("--size", "tiny", "--repeats", 2, "--threads", 1, "--dtype", "bfloat16", "--device", "cpu")
    return run(*flags, "--output", output), output


@pytest.fixture(scope="module")
def result(finished):
    process, output = finished
    assert process.returncode == 0, process.stderr
    return json.loads(output.read_text())


def test_flags_decide_what_is_measured(result):
    settings = {"size": "tiny", "dtype": "bfloat16", "device": "cpu", "repeats": 2, "threads": 1}
    assert result["settings"] == settings
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["device"]


def test_every_variant_is_measured_in_every_round(result):
    variants = {"ours", "eager", "reference"}
    for figure in ("vision_seconds", "first_token_seconds", "per_token_seconds", "samplers_seconds"):
        assert result["repeats"][figure].keys() == variants
        assert all(len(values) == 2 and min(values) > 0 for values in result["repeats"][figure].values())
    assert result["repeats"]["preprocessing_seconds"].keys() == {"ours", "pil_resizes"}
    assert all(len(values) == 2 and min(values) > 0 for values in result["repeats"]["machine"].values())
    for figure in ("vision_allocated_bytes", "first_token_allocated_bytes"):
        assert all(len(values) == 1 and min(values) > 0 for values in result["repeats"][figure].values())


def test_variants_were_compared_in_float32_before_timing(result):
    assert result["relative_errors"].keys() == {"eager", "reference"}
    assert all(0 < error < 1e-5 for error in result["relative_errors"].values())


def test_work_is_counted(result):
    size = SIZES["tiny"]
    width, mlp, vocab = size.text_width, size.text_mlp, size.vocab_size
    layer = 4 * width**2 + 3 * width * mlp + 2 * width  # attention, gated MLP, two norms
    assert result["work"]["bytes_per_token"] == 2 * (size.text_layers * layer + vocab * width)

    patches, question, prompt = (size.image_side // size.patch_side) ** 2, 20, result["prompt_tokens"]
    vision = size.vision_width
    dense = 2 * size.vision_layers * (4 * vision**2 + 2 * vision * size.vision_mlp) * (5 * patches + question)
    attention = 4 * size.vision_layers * vision * (4 * patches**2 + (patches + question) ** 2)
    language = (
        2 * size.text_layers * (4 * width**2 + 3 * width * mlp) * prompt + 4 * size.text_layers * width * prompt**2
    )
    rest = result["work"]["prefill_flops"] - dense - attention - language
    # patch embedding, projectors, samplers, one row of logits
    assert 0 < rest < 0.5 * result["work"]["prefill_flops"]


def test_the_figures_are_printed(finished):
    process, _ = finished
    assert "time to first token / reference" in process.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--repeats", "0"), "0 is not 1 or more"),
        (("--threads", "-1"), "-1 is not 1 or more"),
        (("--size", "huge"), "invalid choice: 'huge'"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_a_wrong_flag_is_named(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_cuda_device_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cuda"])
    with pytest.raises(SystemExit):
        main()
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


def test_order_changes_from_round_to_round():
    assert [turned(["a", "b", "c"], index)[0] for index in range(4)] == ["a", "b", "c", "a"]


def test_ratios_are_paired_by_round():
    # the machine is twice as slow in the second round
    measured = {
        "first_token_seconds": {"ours": [1.0, 2.0], "reference": [4.0, 8.0]},
        "per_token_seconds": {"ours": [0.5, 1.0]},
        "machine": {"matmul_flops_per_second": [20.0, 10.0], "copy_bytes_per_second": [8.0, 4.0]},
    }
    result = compare(measured, {"prefill_flops": 10, "bytes_per_token": 2})
    assert result["ratios"]["first_token_seconds"]["reference"] == {"median": 0.25, "min": 0.25, "max": 0.25}
    assert result["machine_fractions"]["first_token_seconds"]["ours"]["median"] == 0.5
    assert result["machine_fractions"]["per_token_seconds"]["ours"]["median"] == 0.5
