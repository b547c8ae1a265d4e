"""`fusion-hf plan`: what a recipe will take on given GPUs, and whether it fits."""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_hf.cli.argument_types import config_file, positive, wrong_argument
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
    """Tell the command line about `plan`."""
    parser = commands.add_parser(
        "plan",
        help="see what a recipe takes, and whether it fits",
        description="Memory per GPU, steps, tokens and FLOPs of a recipe, before anything is downloaded or allocated. "
        "Exit status: 0 fits, 1 does not fit, 2 wrong input.",
    )
    parser.add_argument("recipe", type=config_file, metavar="RECIPE.yaml", help="one of configs/recipes, or your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as per_device_train_batch_size=2")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="of all nodes; default: %(default)s")
    parser.add_argument("--gpu-memory", type=_amount, default=80.0, metavar="GIB", help="default: %(default)g")
    parser.add_argument("--sharding", choices=SHARDINGS, default="auto", help="default: the first that fits")
    parser.add_argument(
        "--config", type=config_file, metavar="FILE", help="the model's config.json; default: the recipe's model"
    )
    parser.add_argument("--records", type=positive, metavar="N", help="default: from the names of the mixture's files")
    parser.add_argument("--tokens-per-record", type=positive, metavar="N", help="on average, image and latents too")
    parser.add_argument("--tflops", type=_amount, metavar="N", help="that a GPU reaches, for the time")
    parser.add_argument("--json", action="store_true", help="all numbers, in bytes, as JSON")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise wrong_argument(text, "a number above 0")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; returns the exit status."""
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
    The file `given`, or the configuration of the recipe's model if that is on disk, or, since a stage's start is only
    there after the stage before, that of the family member that the recipe's folder is named after.

    Raises:
        InputError: if there is none, or it is not a FUSION's.
    """
    model = Path(values["model"]).expanduser()
    family = recipe.resolve().parent
    candidates = [model / "config.json", family.parent.parent / "models" / f"{family.name}.json"]
    if given is not None:
        candidates = [Path(given)]
        if not candidates[0].is_file():
            raise InputError(
                f"--config is {given!r}, which is no file; give a config.json, as those in configs/models."
            )
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise InputError(f"model {values['model']!r} is not on disk, so its size is not known; give --config FILE.")
    content = read_config(file)
    model_type = content.get("model_type")
    if model_type != MODEL_TYPE and not is_authors_type(content):
        shown = short_name(repr(model_type))
        raise InputError(f"{file} is of a {shown} model; allowed: {MODEL_TYPE!r}.")
    return file


def count_records(data: str) -> int | None:
    """Records of a mixture by its files' names (`-558k` is 558,000); None if a name does not tell, or it is none."""
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
    """Return a plan for people."""
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
        return [*lines, "the number of records is not known: give --records for steps, tokens and FLOPs"]
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
