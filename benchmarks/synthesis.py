"""The data engine without a model: precision and recall of its filters, and the whole run on drawn records.

    python benchmarks/synthesis.py --output benchmarks/results/synthesis_cpu.json
    python benchmarks/report.py

`filters` counts what each filter rejects of records with known faults and without. `run` times `fusion-hf synthesize
--backend procedural` in processes of its own, with one worker and with two in turn, and one long run whose peak memory
is compared with that of the short ones. Times include the start of the command.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from filter_accuracy import measure
from measure import paired_ratios, positive, read_result, summarize, surroundings, write_result
from memory import BYTES_PER_KIB
from tqdm import tqdm

PACKAGES = ("datatrove",)
WORKERS = (1, 2)
TASKS = 2  # the same number of tasks in every run, for the same work


class Timed(NamedTuple):
    """A run of the command. `peak` is the resident memory of its largest process in bytes."""

    seconds: float
    peak: int


def run_command(records: int, workers: int, tasks: int) -> Timed:
    """
    Run `fusion-hf synthesize` with the procedural backend, from the start of Python to the data card.

    Raises:
        RuntimeError: if the command fails.
    """
    with TemporaryDirectory() as folder:
        config = Path(folder) / "drawn.yaml"
        config.write_text(
            f"output: {folder}/out\nrecords: {records}\nseed: 0\nbackend: procedural\n"
            f"executor: {{kind: local, tasks: {tasks}, workers: {workers}}}\n"
        )
        command = [sys.executable, "-m", "fusion_hf", "synthesize", str(config)]
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)  # resource usage of this process and its children
            seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"The command ended with status {process.returncode}:\n{log.read_text()}")
    unit = 1 if sys.platform == "darwin" else BYTES_PER_KIB
    return Timed(seconds, usage.ru_maxrss * unit)


def measure_filters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every filter."""
    figures = measure(arguments.cases, arguments.seed)
    return {"cases": arguments.cases, "seed": arguments.seed, "filters": [found.to_dict() for found in figures]}


def measure_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure rounds of short runs with one worker and with two, and a long run."""
    start = [
        run_command(1, 1, 1).seconds for _ in range(arguments.rounds)
    ]  # the part that does not grow with the records
    rounds: dict[int, list[Timed]] = {workers: [] for workers in WORKERS}
    for index in tqdm(range(arguments.rounds), desc="rounds"):
        for workers in WORKERS[:: 1 if index % 2 == 0 else -1]:
            rounds[workers].append(run_command(arguments.records // 10, workers, TASKS))
    long = run_command(arguments.records, WORKERS[-1], TASKS)
    seconds = {workers: [timed.seconds for timed in found] for workers, found in rounds.items()}
    per_core = [arguments.records / 10 / value for value in seconds[1]]
    return {
        "records": arguments.records,
        "start_seconds": summarize(start),
        "short": {
            "records": arguments.records // 10,
            "seconds": {str(workers): summarize(values) for workers, values in seconds.items()},
            "records_per_second_one_worker": summarize(per_core),
            "speedup_two_workers": paired_ratios(seconds[1], seconds[2]),
            "peak_bytes": max(timed.peak for timed in rounds[WORKERS[-1]]),
        },
        "long": {
            "workers": WORKERS[-1],
            "tasks": TASKS,
            "seconds": long.seconds,
            "records_per_second_and_worker": arguments.records / long.seconds / WORKERS[-1],
            "peak_bytes": long.peak,
        },
    }


PARTS = {"filters": measure_filters, "run": measure_run}


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", choices=PARTS, nargs="+", default=list(PARTS), help="parts to measure; default: all"
    )
    parser.add_argument("--cases", type=positive, default=50, help="number of records per kind, category and filter")
    parser.add_argument("--seed", type=int, default=7, help="seed of the records for the filters")
    parser.add_argument(
        "--records", type=positive, default=100_000, help="number of records of the long run; short ones have a tenth"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="number of short runs")
    parser.add_argument("--output", type=Path, help="JSON file for the result; other parts in it are kept")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> None:
    arguments = parse_arguments(command_line)
    result = read_result(arguments.output)
    for part in arguments.parts:
        result[part] = PARTS[part](arguments) | surroundings("cpu", PACKAGES)
        write_result(result, arguments.output)
        print(part, "measured")


if __name__ == "__main__":
    main()
