"""`fusion-hf plan`: the memory and the work of a recipe on given GPUs, and whether it fits."""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_hf.cli.argument_types import amount, config_file, positive
from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, JSON_HELP
from fusion_hf.cli.terminal import FAILED
from fusion_hf.common.errors import InputError, short_name
from fusion_hf.hub.folders import MODEL_TYPE, is_authors_type, read_config

if TYPE_CHECKING:
    from fusion_hf.training.planning import GpuMemory, TrainingPlan

GIB = 2**30
SHARDINGS = ("auto", "none", "ddp", "zero2", "zero3", "fsdp2")
THOUSANDS = re.compile(r"-(\d+)k\.\w+$")  # a file's name carries its size
TFLOP, DAY, HOUR = 1e12, 86400, 3600


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `plan` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "plan",
        help="Predict the memory and the work of a training run.",
        description="Predict the memory per GPU, the steps, the tokens and the FLOPs of a training run. Nothing is "
        "downloaded or allocated. The exit status is 0 if the run fits, 1 if it does not fit and 2 for wrong input.",
        examples=(
            "fusion-hf plan recipe.yaml",
            "fusion-hf plan recipe.yaml global_batch_size=32 --gpus 8 --gpu-memory 40",
        ),
    )
    parser.add_argument("recipe", type=config_file, metavar="RECIPE.yaml", help="The recipe to plan.")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Keys of the recipe with other values, such as global_batch_size=32.",
    )
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="Number of GPUs on all nodes (default: %(default)s)."
    )
    parser.add_argument(
        "--gpu-memory", type=amount, default=80.0, metavar="GIB", help="Memory of a GPU in GiB (default: %(default)g)."
    )
    parser.add_argument(
        "--sharding",
        choices=SHARDINGS,
        default="auto",
        help="How weights, gradients and optimizer states are sharded (default: auto, the first one that fits).",
    )
    parser.add_argument(
        "--config",
        type=config_file,
        metavar="FILE",
        help="The config.json of the model (default: that of the model in the recipe).",
    )
    parser.add_argument(
        "--records",
        type=positive,
        metavar="N",
        help="Number of training records (default: taken from the file names of the mixture, such as -558k).",
    )
    parser.add_argument(
        "--tokens-per-record",
        type=positive,
        metavar="N",
        help="Average number of tokens per record, with image and latent tokens (default: estimated).",
    )
    parser.add_argument(
        "--tflops",
        type=amount,
        metavar="N",
        help="TFLOP/s that a GPU reaches. If given, the plan includes the training time.",
    )
    parser.add_argument("--json", action="store_true", help=f"{JSON_HELP} Sizes are in bytes.")
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, and return the exit status."""
    from fusion_hf.training.recipe import load_recipe, split_batch
    from fusion_hf.training.recipe_keys import check_optimizer

    values = load_recipe(arguments.recipe, arguments.overrides)
    file = find_config(values, Path(arguments.recipe), arguments.config)
    check_optimizer(values)
    if values.get("global_batch_size") is not None:
        split_batch(values, arguments.gpus)
    records = arguments.records if arguments.records is not None else count_records(values["data"])
    from fusion_hf.conversion.upstream_config import read_checkpoint_config
    from fusion_hf.inference.loading import load_config
    from fusion_hf.training.planning import Machine, Planner

    config = read_checkpoint_config(file) if is_authors_type(read_config(file)) else load_config(file)
    machine = Machine(arguments.gpus, int(arguments.gpu_memory * GIB), arguments.sharding)
    plan = Planner(config, values).plan(machine, records, arguments.tokens_per_record)
    text = json.dumps(as_json(plan, arguments.tflops), indent=2) if arguments.json else table(plan, arguments.tflops)
    sys.stdout.write(f"{text}\n")
    return 0 if plan.fits else FAILED


def find_config(values: dict[str, Any], recipe: Path, given: str | None) -> Path:
    """
    Find the configuration of the model that a recipe trains.

    Args:
        values: The keys of the recipe.
        recipe: The recipe's file.
        given: A configuration file that takes precedence.

    Returns:
        The file `given`; else the configuration of the recipe's model if that is on disk; else, since the start of a
        stage only exists after the stage before, that of the family member that the recipe's folder is named after.

    Raises:
        InputError: If there is none, or if it is not a FUSION's.
    """
    model = Path(values["model"]).expanduser()
    family = recipe.resolve().parent
    candidates = [model / "config.json", family.parent.parent / "models" / f"{family.name}.json"]
    if given is not None:
        candidates = [Path(given)]
        if not candidates[0].is_file():
            raise InputError(f"`--config` must be the config.json of a FUSION, got {given!r}, which does not exist.")
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise InputError(
            f"The model {values['model']!r} is not on disk, so its size is unknown; pass `--config FILE`."
        )
    content = read_config(file)
    model_type = content.get("model_type")
    if model_type != MODEL_TYPE and not is_authors_type(content):
        shown = short_name(repr(model_type))
        raise InputError(f"`model_type` in {file} must be {MODEL_TYPE!r}, got {shown}.")
    return file


def count_records(data: str) -> int | None:
    """Count the records of a mixture by the names of its files (`-558k` is 558,000); None if a name has no number."""
    from fusion_hf.data.mixture import SUFFIXES, read_entries

    if Path(data).suffix not in SUFFIXES:
        return None
    total = 0
    for entry in read_entries(data):
        match = THOUSANDS.search(entry.json_path)
        if match is None:
            return None
        total += entry.sampling_strategy.count(1000 * int(match[1]), entry.name)
    return total


def as_json(plan: "TrainingPlan", tflops: float | None) -> dict[str, Any]:
    """Return all numbers of a plan."""
    return {
        **asdict(plan),
        "memory": {**asdict(plan.memory), "total": plan.memory.total, "usable": plan.machine.usable},
        "seconds": _seconds(plan, tflops),
    }


def _seconds(plan: "TrainingPlan", tflops: float | None) -> float | None:
    if plan.work is None or tflops is None:
        return None
    return plan.work.model_flops / (plan.machine.gpus * tflops * TFLOP)


def table(plan: "TrainingPlan", tflops: float | None) -> str:
    """Format a plan as text."""
    lines = [f"{'weights':24}{'all':>12}{'trained':>12}"]
    for part, count in plan.weights.by_part.items():
        lines.append(f"  {part:22}{_millions(count):>12}{_millions(plan.weights.trained[part]):>12}")
    lines.append(f"  {'sum':22}{_millions(plan.weights.total):>12}{_millions(plan.weights.total_trained):>12}")
    lines += ["", *_memory_lines(plan, plan.memory), "", *_work_lines(plan, tflops), "", _verdict(plan)]
    lines += [f"  {change:32}{_gib(size):>12}" for change, size in plan.help.items()]
    return "\n".join(lines)


def _memory_lines(plan: "TrainingPlan", memory: "GpuMemory") -> list[str]:
    gpus = f"{plan.machine.gpus} GPU{'s' if plan.machine.gpus > 1 else ''}"
    rows = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
        "communication": memory.communication,
        "activations": memory.activations,
        "sum": memory.total,
    }
    return [
        f"memory of each of {gpus}, sharding {memory.sharding}, at the worst moment ({memory.moment})",
        f"  batch of {memory.batch} x {memory.accumulation} passes a step, longest sequences, most latents",
        *(f"  {name:22}{_gib(size):>12}" for name, size in rows.items()),
        f"  {'usable':22}{_gib(plan.machine.usable):>12}  of {_gib(plan.machine.memory)}",
    ]


def _work_lines(plan: "TrainingPlan", tflops: float | None) -> list[str]:
    flops = plan.record_flops
    record = f"a record of {plan.record_tokens} tokens: {flops.training / TFLOP:.1f} TFLOPs forward and backward"
    lines = [f"{record}, {flops.recomputed / TFLOP:.1f} more with checkpointing"]
    if plan.work is None:
        return [*lines, "The number of records is unknown. Pass --records to see steps, tokens and FLOPs."]
    work = plan.work
    lines += [
        f"  {'records':22}{work.records:>18,}",
        f"  {'steps':22}{work.steps:>18,}",
        f"  {'tokens':22}{work.tokens:>18,}",
        f"  {'FLOPs of the model':22}{work.model_flops:>18.3g}",
        f"  {'FLOPs computed':22}{work.hardware_flops:>18.3g}",
    ]
    seconds = _seconds(plan, tflops)
    if seconds is not None:
        days = f"{seconds / DAY:.2f} days" if seconds >= DAY else f"{seconds / HOUR:.2f} hours"
        lines.append(f"  {'time':22}{days:>18}  at {tflops:g} TFLOP/s of the model on each GPU")
    return lines


def _verdict(plan: "TrainingPlan") -> str:
    if plan.fits:
        return f"It fits. Largest batch per GPU and pass that fits: {plan.largest_batch}."
    if plan.largest_batch is not None:
        return f"It does not fit; per_device_train_batch_size={plan.largest_batch} would. What each would need:"
    return "It does not fit. What each of these would need:"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
