"""`benchmarks/inference.py` as users run it: a process with flags, and the file that it writes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import plot
import pytest
import torch
import workload
from contestants import COMPILED, NAMES, OURS
from growth import QUESTION_LENGTHS, QUESTIONS, SHARED, TURNS
from inference import compare, main, parse_arguments, turned
from inference import run as measure_everything
from profiling import TOP
from report import COMPARISON, INFERENCE, NOT_MEASURED, PLOTS, render
from workload import SIZES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "inference.py"
SECONDS, COMPILING_SECONDS = 120, 900


def run(*flags, seconds=SECONDS):
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


PLAIN = [name for name in NAMES if name not in COMPILED]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, working_peers):
    output = tmp_path_factory.mktemp("benchmark") / "results" / "tiny.json"
    flags = ("--size", "tiny", "--repeats", 2, "--slow-repeats", 1, "--threads", 1, "--dtype", "bfloat16", "--profile")
    return run(*flags, "--batches", "1,3", "--models", ",".join(PLAIN), "--device", "cpu", "--output", output), output


@pytest.fixture(scope="module")
def result(finished):
    process, output = finished
    assert process.returncode == 0, process.stderr
    return json.loads(output.read_text())


def test_flags_decide_what_is_measured(result):
    settings = {"size": "tiny", "dtype": "bfloat16", "device": "cpu", "repeats": 2, "slow_repeats": 1, "threads": 1}
    assert result["settings"] == settings | {"batches": [1, 3]}
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["device"]
    assert result["contestants"].keys() == set(PLAIN)
    assert result["contestants"][OURS]["prompt_tokens"] == result["prompt_tokens"]


def test_every_contestant_is_measured_in_every_round(result):
    for figure in ("vision_seconds", "first_token_seconds", "per_token_seconds"):
        assert result["repeats"][figure].keys() == set(PLAIN)
        assert all(len(values) == 2 and min(values) > 0 for values in result["repeats"][figure].values())
    vision, first = (result["repeats"][f"{figure}_seconds"] for figure in ("vision", "first_token"))
    assert all(part < whole for name in PLAIN for part, whole in zip(vision[name], first[name], strict=True))
    assert result["repeats"]["samplers_seconds"].keys() == {"ours", "eager", "reference"}
    assert result["repeats"]["preprocessing_seconds"].keys() == {"ours", "pil_resizes"}
    assert len(result["repeats"]["machine"]) == 3
    assert all(len(values) == 2 and min(values) > 0 for values in result["repeats"]["machine"].values())
    for figure in ("vision_allocated_bytes", "first_token_allocated_bytes"):
        assert result["repeats"][figure].keys() == set(PLAIN)
        assert all(len(values) == 1 and min(values) > 0 for values in result["repeats"][figure].values())
    for fractions in result["machine_fractions"].values():
        assert fractions.keys() == set(PLAIN)


def test_growth_and_throughput(result):
    growth = result["growth_seconds"]
    for what, steps in (("question_tokens", QUESTION_LENGTHS), ("turns", TURNS), ("questions", QUESTIONS)):
        names = {"ours", "llava_onevision", *([SHARED] if what == "questions" else [])}
        assert growth[what].keys() == names
        assert all(list(rounds) == [str(step) for step in steps] for rounds in growth[what].values())
        assert all(len(values) == 1 for rounds in growth[what].values() for values in rounds.values())
    for rounds in growth["questions"].values():  # times of one question after the other
        assert sorted(rounds.values()) == list(rounds.values())
    assert result["tokens_per_second"].keys() == {"ours", "llava_onevision"}
    assert all(list(batches) == ["1", "3"] for batches in result["tokens_per_second"].values())


def test_the_profile_lists_what_takes_most_of_the_time(result):
    assert result["profile"].keys() == {"ours"}
    for rows in result["profile"]["ours"].values():
        shares = [row["share"] for row in rows]
        assert len(shares) == TOP
        assert sorted(shares, reverse=True) == shares
        assert 0 < sum(shares) <= 1
    prefill, decoding = ({row["name"] for row in rows} for rows in result["profile"]["ours"].values())
    assert "aten::addmm" in prefill
    assert "aten::addmm" not in decoding  # the language model has no biases, and no image is encoded
    assert "aten::mm" in decoding


def test_tables_and_plots_show_all_of_it(result, tmp_path):
    for table in (INFERENCE, COMPARISON):
        lines = render(table, {"CPU": result}).splitlines()
        missing = {line.split(" | ")[0].strip("| ") for line in lines if line.endswith(f"| {NOT_MEASURED} |")}
        assert all("compiled" in name or name.startswith("batch ") for name in missing)
        assert len(missing) < len(table.rows) / 3
    panels = PLOTS[0].panels(result)
    assert [len(panel.lines) for panel in panels] == [2, 2, 3, 2]
    plot.draw(tmp_path / "assets" / "growth.svg", panels)
    drawn = (tmp_path / "assets" / "growth.svg").read_text()
    assert all(text in drawn for text in (SHARED, "LLaVA-OneVision, one tile", "rows of a batch"))


def test_ways_of_computing_fusion_were_compared_in_float32_before_timing(result):
    assert result["relative_errors"].keys() == {"eager", "reference"}
    assert all(0 < error < 1e-5 for error in result["relative_errors"].values())


def test_work_is_counted(result):
    size = SIZES["tiny"]
    width, mlp, vocab = size.text_width, size.text_mlp, size.vocab_size
    layer = 4 * width**2 + 3 * width * mlp + 2 * width  # attention, gated MLP, two norms
    prompt = result["prompt_tokens"]
    cache = 2 * size.text_layers * width * (prompt + size.new_tokens / 2)
    assert result["work"]["bytes_per_token"][OURS] == 2 * (size.text_layers * layer + vocab * width + cache)

    patches, question = (size.image_side // size.patch_side) ** 2, 20
    vision = size.vision_width
    dense = 2 * size.vision_layers * (4 * vision**2 + 2 * vision * size.vision_mlp) * (5 * patches + question)
    attention = 4 * size.vision_layers * vision * (4 * patches**2 + (patches + question) ** 2)
    pairs = prompt * (prompt + 1) // 2
    language = size.text_layers * (2 * (4 * width**2 + 3 * width * mlp) * prompt + 4 * width * pairs)
    flops = result["work"]["prefill_flops"]
    rest = flops[OURS] - dense - attention - language
    # patch embedding, projectors, samplers, one row of logits
    assert 0 < rest < 0.5 * flops[OURS]
    assert flops["eager"] == flops["reference"] == flops[OURS]
    assert flops["llava_onevision"] < flops["llava_onevision_tiled"]


@pytest.mark.slow
def test_compiled_decoding(tmp_path):
    output = tmp_path / "tiny.json"
    names = ["ours", "llava_onevision", *COMPILED]
    flags = ("--size", "tiny", "--repeats", 1, "--slow-repeats", 1, "--threads", 1, "--batches", 1)
    process = run(*flags, "--models", ",".join(names), "--output", output, seconds=COMPILING_SECONDS)
    assert process.returncode == 0, process.stderr
    result = json.loads(output.read_text())
    assert result["repeats"]["per_token_seconds"].keys() == set(names)
    assert result["work"]["prefill_flops"]["ours_compiled"] == result["work"]["prefill_flops"]["ours"]
    missing = {row.name for row in COMPARISON.rows if "compiled" in row.name and row.cell(result) is None}
    assert missing == set()


@pytest.fixture
def shrunk_3b(monkeypatch, tmp_path, working_peers):
    """A published configuration with few and narrow layers in the place of FUSION 3B's."""
    config = json.loads((workload.RELEASED / "fusion-3b.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    config["text_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": rope | {name: [1.0] * 8 for name in ("long_factor", "short_factor")},
    }
    config["vision_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 56,
    }
    config |= {"sampler_layers": [0], "vision_early_layers": 2, "query_len": 4, "query_lens": [4], "window_size": 2}
    (tmp_path / "fusion-3b.json").write_text(json.dumps(config))
    monkeypatch.setattr(workload, "RELEASED", tmp_path)
    size = replace(workload.released_size("fusion-3b"), photo=(120, 90), matrix_side=64, copied_bytes=2**16)
    monkeypatch.setitem(SIZES, "3b", size)


def test_a_published_size(shrunk_3b):
    flags = ["--size", "3b", "--dtype", "bfloat16", "--repeats", "1", "--slow-repeats", "1", "--batches", "2"]
    names = "ours,llava_onevision,llava_onevision_tiled,smolvlm"
    threads = str(torch.get_num_threads())
    result = measure_everything(parse_arguments([*flags, "--models", names, "--threads", threads]))
    assert result["contestants"].keys() == set(names.split(","))
    assert result["relative_errors"] == {}
    assert COMPARISON.conditions(result)
    assert all(list(batches) == ["2"] for batches in result["tokens_per_second"].values())


def test_the_figures_are_printed(finished):
    process, _ = finished
    for figure in ("time to first token / reference", "time to first token / LLaVA-OneVision, one tile", "decoding:"):
        assert figure in process.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--repeats", "0"), "must be 1 or more, got 0"),
        (("--threads", "-1"), "must be 1 or more, got -1"),
        (("--size", "huge"), "invalid choice: 'huge'"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--batches", "1,0"), "must be 1 or more, got 0"),
        (("--slow-repeats", "0"), "must be 1 or more, got 0"),
        (("--models", "ours,gpt"), "must be one of ours, eager"),
        (("--models", "eager"), "ours must be among them"),
        (("--models", "ours,llava_onevision_compiled"), "llava_onevision must be among them"),
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
        "machine": {
            "matmul_flops_per_second": [20.0, 10.0],
            "copy_bytes_per_second": [8.0, 4.0],
            "read_bytes_per_second": [16.0, 8.0],
        },
    }
    result = compare(measured, {"prefill_flops": {"ours": 10, "reference": 5}, "bytes_per_token": {"ours": 2}})
    assert result["ratios"]["first_token_seconds"]["reference"] == {"median": 0.25, "min": 0.25, "max": 0.25}
    fractions = result["machine_fractions"]
    assert fractions["prefill_of_matrix_rate"]["ours"]["median"] == 0.5
    assert fractions["decoding_of_copy_rate"]["ours"]["median"] == 0.5
    assert fractions["decoding_of_read_rate"]["ours"]["median"] == 0.25
