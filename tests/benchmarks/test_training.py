"""`benchmarks/training.py` as users run it, and its parts: steps, loader, overhead of a run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from blocks import NOT_MEASURED, describe
from loading import LoaderBenchmark
from overhead import COMPUTATION, StepClock
from report import TRAINING
from steps import OURS, StepBenchmark, compare, relative_error
from training import PARTS, parse_arguments, run
from workload import TRAINING_SIZES, make_batch

from fusion_hf.training.collator import IGNORE_INDEX
from fusion_hf.training.flops import BatchShape, step_flops

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"
SECONDS = 120
CPU = torch.device("cpu")
SIZE = TRAINING_SIZES["tiny"]
VARIANTS = {"ours", "ours_checkpointed", "eager", "reference", "reference_checkpointed"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "results" / "tiny.json"
    flags = ("--size", "tiny", "--rounds", 2, "--threads", 1, "--output", output)
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS), output


@pytest.fixture(scope="module")
def result(finished):
    process, output = finished
    assert process.returncode == 0, process.stderr
    return json.loads(output.read_text())


def test_the_parts_and_their_settings_are_in_the_result(result):
    expected = {"size": "tiny", "dtype": "float32", "autocast": False, "device": "cpu", "rounds": 2, "threads": 1}
    assert result["settings"] == expected
    assert result.keys() == {"settings", "machine", "versions", *PARTS}


def test_every_variant_is_measured_in_every_round(result):
    step = result["step"]
    assert step["out_of_memory"] == []
    for figure in ("passes_seconds", "step_seconds"):
        assert step["rounds"][figure].keys() == VARIANTS
        assert all(len(values) == 2 and min(values) > 0 for values in step["rounds"][figure].values())
    times = [step["rounds"][figure][OURS] for figure in ("passes_seconds", "step_seconds")]
    for passes, whole in zip(*times, strict=True):
        assert passes < whole
    assert step["medians"]["allocated_bytes"].keys() == VARIANTS


def test_variants_are_one_function(result):
    assert result["step"]["relative_errors"].keys() == VARIANTS - {OURS}
    assert all(error < 1e-5 for error in result["step"]["relative_errors"].values())
    assert result["step"]["relative_errors"]["reference"] > 0


def test_checkpointing_needs_less_memory_and_every_step_the_gradients(result):
    held = result["step"]["medians"]["allocated_bytes"]
    assert result["step"]["weight_bytes"] < held["ours_checkpointed"] < held[OURS] < held["reference"]


def test_work_is_what_the_variant_computes(result):
    work, (batch, sequence) = result["step"]["work_flops"], result["step"]["tokens"]
    config = SIZE.config()
    assert (
        work["reference"] == step_flops(config, BatchShape(batch, sequence, 40, SIZE.turns, SIZE.query_len)).training
    )
    unlabelled = sequence - 2 * 20  # both samples have their answers at the same places
    head = 6 * config.text_config.hidden_size * config.text_config.vocab_size
    assert work["reference"] - work[OURS] == batch * unlabelled * head


def test_loader_and_run_are_measured(result):
    assert result["loader"]["ratios"].keys() == {"1", "2"}
    assert all(len(values) == 2 and min(values) > 0 for values in result["loader"]["rounds"].values())
    shares = result["trainer"]["rounds"]
    assert len(shares["rest"]) == len(shares["collation"]) == 2
    assert all(0 < part < whole < 1 for part, whole in zip(shares["collation"], shares["rest"], strict=True))


def test_the_figures_are_printed(finished, result):
    process, _ = finished
    assert "step / reference" in process.stdout
    assert NOT_MEASURED not in process.stdout


def test_only_the_parts_that_were_asked_for_run():
    assert parse_arguments(["--parts", "loader"]).parts == ["loader"]
    assert parse_arguments([]).parts == list(PARTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rounds", "0"), "must be 1 or more, got 0"),
        (("--size", "70b"), "invalid choice: '70b'"),
        (("--dtype", "float16"), "invalid choice: 'float16'"),
        (("--parts", "speed"), "invalid choice: 'speed'"),
    ],
)
def test_a_wrong_flag_is_named(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(list(flags))
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_weights_and_products_in_half_precision():
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        benchmark = StepBenchmark(SIZE, dtype, CPU, autocast=autocast)
        benchmark.time_round(0)
        assert {weight.dtype for weight in benchmark.weights.values()} == {dtype}
        assert benchmark.result()["ratios"]["step_seconds"][OURS]["reference"]["median"] > 0


@pytest.mark.slow
def test_a_variant_without_enough_memory_is_left_out(monkeypatch):
    passes = StepBenchmark.passes

    def run_out(self, name):
        if name in ("ours", "reference"):
            raise torch.OutOfMemoryError
        return passes(self, name)

    monkeypatch.setattr(StepBenchmark, "passes", run_out)
    benchmark = StepBenchmark(SIZE, torch.float32, CPU, autocast=False)
    benchmark.time_round(0)
    benchmark.measure_memory()
    result = benchmark.result()
    assert result["out_of_memory"] == ["ours", "reference"]
    assert result["ratios"]["step_seconds"].keys() == {"ours_checkpointed"}
    assert result["relative_errors"].keys() == {"eager", "reference_checkpointed"}


@pytest.mark.slow
def test_where_nothing_fits_it_is_said(monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(StepBenchmark, "passes", run_out)
    with pytest.raises(RuntimeError, match="No variant with 2 samples fits into the memory of cpu"):
        StepBenchmark(SIZE, torch.float32, CPU, autocast=False)
    monkeypatch.setattr("training.measure_overhead", run_out)
    arguments = parse_arguments(["--size", "tiny", "--rounds", "1", "--parts", "trainer"])
    result = run(arguments)
    assert result["trainer"] == {"out_of_memory": True}
    assert "out of memory" in describe(TRAINING, result)


def test_a_variant_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr("steps.relative_error", lambda result, expected: 0.01)
    with pytest.raises(
        RuntimeError, match=r"gradient of 'ours_checkpointed' may differ from ours by at most .* got 1\.0e-02"
    ):
        StepBenchmark(SIZE, torch.float32, CPU, autocast=False)


def test_errors_are_of_loss_and_whole_gradient():
    one, expected = torch.tensor(1.0), {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert relative_error((one, expected), (one, expected)) == 0
    changed = expected | {"b": torch.tensor([0.0, 0.5])}
    assert relative_error((one, changed), (one, expected)) == pytest.approx(0.1)
    assert relative_error((one * 1.2, expected), (one, expected)) == pytest.approx(0.2)
    assert relative_error((one, {"a": expected["a"]}), (one, expected)) == float("inf")


def test_ratios_are_of_pairs_that_were_measured():
    ratios = compare({"ours": [1.0, 2.0], "reference": [4.0, 8.0]})
    assert ratios == {"ours": {"reference": {"median": 0.25, "min": 0.25, "max": 0.25}}}


def test_batches_have_images_turns_and_labels():
    config = SIZE.config()
    batch = make_batch(config, SIZE, CPU)
    side = config.vision_config.image_size
    assert batch["pixel_values"].shape == (SIZE.batch, 5, 3, side, side)
    assert (batch["input_ids"] == config.image_token_id).sum(1).tolist() == [config.num_image_tokens] * 2
    assert (batch["input_ids"] == config.latent_token_id).sum(1).tolist() == [SIZE.query_len * SIZE.turns] * 2
    labelled = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    for ends, row in zip(batch["prompt_end_positions"], labelled, strict=True):
        assert row[ends + 1].all() and not row[ends].any()


@pytest.mark.parametrize(("name", "layers"), [("3b", 32), ("8b", 32), ("middle", 12)])
def test_published_sizes_are_known(name, layers):
    config = TRAINING_SIZES[name].config()
    assert config.text_config.num_hidden_layers == layers
    assert TRAINING_SIZES[name].query_len in config.query_lens


def test_loaders_read_all_records_with_as_many_workers(tmp_path):
    benchmark = LoaderBenchmark(SIZE, tmp_path, (1,))
    ours, plain = (benchmark.loaders[name] for name in ("ours_1", "plain_1"))
    assert ours.num_workers == plain.num_workers == 1
    batches = list(ours)
    assert sum(len(batch["pixel_bytes"]) for batch in batches) == SIZE.records
    assert all((batch["labels"] != IGNORE_INDEX).any(1).all() for batch in batches)
    assert sorted(index for batch in plain for index in batch.tolist()) == list(range(SIZE.records))


def test_the_clock_gives_shares_of_whole_steps():
    clock = StepClock(CPU)
    clock.end_step()
    with clock.on(COMPUTATION):
        time.sleep(0.05)
    time.sleep(0.05)
    clock.end_step()
    assert clock.shares["collation"] == [0.0]
    assert 0.3 < clock.shares["rest"][0] < 0.7
