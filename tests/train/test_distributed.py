"""Training in several processes, launched as users launch it: the same losses and weights as in one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from tests.helpers.tiny import BACKBONES, tiny_config, tiny_model
from tests.helpers.training_runs import ENVIRONMENT, Run, Started, write_model, write_records

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.training.distributed import any_rank, sum_over_ranks
from fusion_hf.training.recipe import load_recipe
from fusion_hf.training.sampler import StepLayout, StepSampler

CONFIGS = Path(__file__).parents[2] / "configs"
LAUNCHES = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
SECONDS = 600  # a hung launch fails its test
RELATIVE = 1e-5  # of losses
ABSOLUTE = 1e-5  # of weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


def launch(run: Run, config: str, *options: str) -> None:
    """`accelerate launch` with two processes; none of them outlives it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(CONFIGS / "accelerate" / f"{config}.yaml"), *options]
    command += ["--module", "fusion_hf", "train", str(run.recipe)]
    errors = run.recipe.with_name("stderr.txt")
    with errors.open("w") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=file)
    started = Started(psutil.Process(process.pid), process, errors)
    try:
        process.wait(SECONDS)
    finally:
        started.kill()
    assert process.returncode == 0, started.stderr()[-6000:]


def make(folder: Path, model: Path, records: Path, **keys: object) -> Run:
    """
    Six steps of four records. The order is not grouped, and by its seed each of two processes once has only text where
    the other has images; a large epsilon keeps Adam from magnifying the rounding of gradients that are nearly zero.
    """
    settings = {
        "group_by": "none",
        "max_steps": 6,
        "save_steps": 4,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 1.0,
        "seed": 14,
        "use_cpu": True,  # also where there is a GPU: one cannot be shared by two processes
    }
    return Run.make(folder, model, records, **{**settings, "gradient_accumulation_steps": 1, **keys})


def assert_same(run: Run, expected: Run, since: int = 0) -> None:
    """The same losses, gradient norms and final weights."""
    log, reference = ([entry for entry in one.log() if entry["step"] > since] for one in (run, expected))
    assert [entry["step"] for entry in log] == [entry["step"] for entry in reference] != []
    for name in ("loss", "language_loss", "mapping_loss", "grad_norm"):
        values = [entry[name] for entry in log]
        assert values == pytest.approx([entry[name] for entry in reference], rel=RELATIVE), name
    weights, others = load_file(run.output / "model.safetensors"), load_file(expected.output / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, others[name], rtol=0, atol=ABSOLUTE, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_reads_the_launch_configs(name: str):
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert config.mixed_precision == "no"  # the recipe's business
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == expected.get(name, "DEEPSPEED")
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name.removeprefix("zero")[0])
        place = "cpu" if name.endswith("offload") else "none"
        assert {config.deepspeed_config[f"offload_{what}_device"] for what in ("optimizer", "param")} == {place}


def test_the_launch_configs_have_no_unknown_options():
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    for name in LAUNCHES:
        values = yaml.safe_load((CONFIGS / "accelerate" / f"{name}.yaml").read_text())
        for section in ("fsdp_config", "deepspeed_config"):
            assert set(values.get(section, {})) <= known, name


def test_the_sbatch_template_is_a_shell_script():
    script = CONFIGS / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    without_recipe = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert without_recipe.returncode == 2 and "RECIPE.yaml" in without_recipe.stderr


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_class_that_fsdp_is_told_to_wrap_is_in_the_model(backbone: str):
    model = tiny_model(tiny_config(backbone))
    assert len(model._no_split_modules) == 2
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


def test_one_process_reduces_to_itself():
    values, cpu = torch.tensor([1.0, 2.0]), torch.device("cpu")
    assert sum_over_ranks(values, cpu) is values
    assert any_rank(True, cpu) and not any_rank(False, cpu)


def test_in_some_step_one_process_has_only_text_and_the_other_images(tmp_path: Path, model: Path, records: Path):
    """What the comparisons below rely on."""
    values = load_recipe(make(tmp_path / "one", model, records).recipe)
    images = ["image" in record for record in json.loads(records.read_text())]
    sampler = StepSampler(len(images), StepLayout(2, world_size=2), [4], values["seed"])
    has_image = [images[key.index] for key in sampler]
    shares = [(any(has_image[i : i + 2]), any(has_image[i + 2 : i + 4])) for i in range(0, len(images), 4)]
    assert len(shares) == values["max_steps"]
    assert {(True, False), (False, True), (True, True)} == set(shares)


def test_fsdp2_in_two_processes_is_one_process(tmp_path: Path, model: Path, records: Path):
    one, two = (make(tmp_path / name, model, records) for name in ("one", "two"))
    one.finish()
    launch(two, "fsdp2")
    assert_same(two, one)
    assert (two.output / "checkpoint-4" / "pytorch_model_fsdp_0" / "__1_0.distcp").is_file()  # it was sharded
    assert not list(two.output.glob("_fsdp*.py"))
    FusionForConditionalGeneration.from_pretrained(two.output)
    assert (two.output / "config.json").read_text() == (one.output / "config.json").read_text()


@pytest.mark.slow
def test_ddp_in_two_processes_is_one_process(tmp_path: Path, model: Path, records: Path):
    one, two = (make(tmp_path / name, model, records) for name in ("one", "two"))
    one.finish()
    launch(two, "ddp")
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_that_accumulate_are_one_process(config: str, tmp_path: Path, model: Path, records: Path):
    one = make(tmp_path / "one", model, records)
    two = make(tmp_path / "two", model, records, gradient_accumulation_steps=2)
    one.finish()
    launch(two, config)
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_micro_batches_of_two_processes_are_those_of_one_that_accumulates(config, tmp_path, model, records):
    """Each has its own number of latent tokens, and the step's loss is the mean of theirs."""
    keys = {"loss_average": "micro_batches", "query_len_draw": "micro_batch", "max_grad_norm": 0.0}
    one = make(tmp_path / "one", model, records, gradient_accumulation_steps=2, **keys)
    two = make(tmp_path / "two", model, records, **keys)
    one.finish()
    launch(two, config)
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2_goes_on_from_its_checkpoint(state: str, tmp_path: Path, model: Path, records: Path):
    one, two = (make(tmp_path / name, model, records) for name in ("one", "two"))
    one.finish()
    launch(two, "fsdp2", "--fsdp_state_dict_type", state)
    shutil.rmtree(two.output / "checkpoint-6")  # back to the one before
    for name in ("finished.json", "model.safetensors"):
        (two.output / name).unlink()
    before = (two.output / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns
    launch(two, "fsdp2", "--fsdp_state_dict_type", state)
    assert (two.output / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns == before  # not begun anew
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3", "zero3_offload"])
def test_zero_in_two_processes_is_one_process(config: str, tmp_path: Path, model: Path, records: Path):
    pytest.importorskip("deepspeed")
    one, two = (make(tmp_path / name, model, records) for name in ("one", "two"))
    one.finish()
    launch(two, config)
    assert_same(two, one)
