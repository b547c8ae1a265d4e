"""Measure everything that requires a GPU, in a few minutes.

    python benchmarks/gpu.py
    python benchmarks/report.py

Parts run in the order of their importance, each with a time limit in a process of its own. Their results are written
at once into the files that `report.py` reads, so that a part that fails or hangs does not affect the others.
`gpu.json` says how each part ended. Nothing is downloaded. `--device cpu --small` runs every part with small sizes, to
try the script without a GPU. Its files have other names.
"""

import argparse
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

# does not start CUDA in this process, from which all parts are forked
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from blocks import RESULTS
from gpu_parts import GPU, SMALL, make_parts
from gpu_schedule import FAILED, SUMMARY, ForkedRunner, Outcome, encode, run_parts
from measure import check_device, positive

from fusion_hf.common.outputs import write_atomically

SECONDS = 360


def write_summary(path: Path, seconds: int, outcomes: dict[str, Outcome]) -> None:
    """Write how the parts have ended so far."""
    summary: dict[str, Any] = {"seconds": seconds}
    summary["parts"] = {name: asdict(outcome) for name, outcome in outcomes.items()}
    write_atomically(path, encode(summary))
    name, last = list(outcomes.items())[-1]
    print(f"{name}: {last.status}, {last.seconds} s {last.error}", flush=True)


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    names = [part.name for part in make_parts(SMALL)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="device; cpu requires --small")
    parser.add_argument("--small", action="store_true", help="use small sizes to try the script")
    parser.add_argument("--parts", choices=names, nargs="+", default=names, help="parts to measure; default: all")
    parser.add_argument(
        "--seconds", type=positive, default=SECONDS, help="time for all parts in seconds; default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for the results; default: benchmarks/results"
    )
    arguments = parser.parse_args(command_line)
    if arguments.small != (arguments.device == "cpu"):
        parser.error("--device cpu and --small go together")
    check_device(parser, arguments.device)
    return arguments


def main(command_line: list[str] | None = None) -> int:
    arguments = parse_arguments(command_line)
    setting = SMALL if arguments.small else GPU
    summary = arguments.output / (f"small_{SUMMARY}" if arguments.small else SUMMARY)
    parts = [part for part in make_parts(setting) if part.name in arguments.parts]
    note = partial(write_summary, summary, arguments.seconds)
    outcomes = run_parts(parts, arguments.seconds, ForkedRunner(arguments.output), note)
    return int(any(outcome.status == FAILED for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
