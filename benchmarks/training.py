"""Time and memory of FUSION's training step beside eager attention and the authors' way; data loader; trainer.

    python benchmarks/training.py --threads 2 --rounds 5 --output benchmarks/results/training_cpu.json
    python benchmarks/report.py

On a GPU, with random weights in a published model's sizes:

    python benchmarks/training.py --device cuda --size 3b --autocast --parts step trainer

A round measures every variant once, in an order that changes from round to round, together with the machine's own
rate. Ratios are taken within a round, so that a slow spell of the machine falls on both sides.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from blocks import describe
from loading import WORKERS, LoaderBenchmark
from measure import DTYPES, check_device, positive, surroundings, write_result
from overhead import measure_overhead
from report import TRAINING
from steps import GRADIENT_DTYPES, StepBenchmark
from tqdm import tqdm
from workload import TRAINING_SIZES


def measure_steps(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the time and memory of single steps."""
    size, dtype = TRAINING_SIZES[arguments.size], DTYPES[arguments.dtype]
    benchmark = StepBenchmark(size, dtype, device, arguments.autocast)
    for index in tqdm(range(arguments.rounds), desc="steps"):
        benchmark.time_round(index)
    benchmark.measure_memory()
    return benchmark.result()


def measure_loader(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the records per second of the data loader."""
    with TemporaryDirectory() as folder:
        benchmark = LoaderBenchmark(TRAINING_SIZES[arguments.size], Path(folder), WORKERS)
        benchmark.time_round(0)  # starts the workers; the result is discarded
        benchmark.measured.clear()
        for index in tqdm(range(arguments.rounds), desc="loader"):
            benchmark.time_round(index)
        return benchmark.result()


def measure_trainer(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure what a real run spends outside passes and optimizer."""
    size = TRAINING_SIZES[arguments.size]
    with TemporaryDirectory() as folder:
        try:
            return measure_overhead(size, Path(folder), device, arguments.rounds, arguments.autocast)
        except torch.OutOfMemoryError:
            return {"out_of_memory": True}


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], dict[str, Any]]] = {
    "step": measure_steps,
    "loader": measure_loader,
    "trainer": measure_trainer,
}


def describe_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Describe the settings of a measurement."""
    names = ("size", "dtype", "autocast", "device", "rounds", "threads")
    return {"settings": {name: getattr(arguments, name) for name in names}, **surroundings(arguments.device)}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the requested parts, and return the content of the JSON file."""
    torch.set_num_threads(arguments.threads)
    result = describe_settings(arguments)
    for part in arguments.parts:
        result[part] = PARTS[part](arguments, torch.device(arguments.device))
        gc.collect()  # hooks create reference cycles in models
    return result


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=TRAINING_SIZES, default="middle", help="size of the model; tiny is for tests"
    )
    parser.add_argument(
        "--parts", choices=PARTS, nargs="+", default=list(PARTS), help="parts to measure; default: all"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    dtypes = [name for name, dtype in DTYPES.items() if dtype in GRADIENT_DTYPES]
    parser.add_argument(
        "--dtype", choices=dtypes, default="float32", help="dtype of weights, gradients and optimizer state"
    )
    parser.add_argument(
        "--autocast", action="store_true", help="compute matrix products in bfloat16, as `bf16: true` does"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="number of rounds after the warm-up")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file, e.g. benchmarks/results/training_cpu.json")
    arguments = parser.parse_args(command_line)
    check_device(parser, arguments.device)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    result = run(arguments)
    write_result(result, arguments.output)
    print(describe(TRAINING, result))


if __name__ == "__main__":
    main()
