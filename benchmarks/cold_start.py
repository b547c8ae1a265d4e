"""Measure the time until `fusion-hf ask` has answered in a new process, for this checkout and another one.

    python benchmarks/cold_start.py --other DIR --output benchmarks/results/cold_start_cpu.json

`DIR` is another checkout, such as a worktree of an earlier commit. Both run in this environment. Files are in the page
cache, since an uncounted round reads them and writes compiled modules.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from measure import paired_ratios, positive, surroundings, turned, write_result

ROOT = Path(__file__).parents[1]
IMAGE, QUESTION, ANSWER = ROOT / "docs" / "assets" / "red_circle.png", "what color is the circle?", "red"
# the imports of `ask` before it loads a model; a checkout without `lean_imports` imports everything
IMPORTS = """
import contextlib, time
begin = time.perf_counter()
import fusion_hf.cli
try:
    from fusion_hf.cli.lean_imports import lean_imports
except ImportError:
    lean_imports = contextlib.nullcontext
with lean_imports(True):
    from tqdm import tqdm
    from fusion_hf.cli.model_loading import AnswerStreamer, load_chat_model
    from fusion_hf.inference.conversation import Conversation
print(time.perf_counter() - begin)
"""
ASK = ("-m", "fusion_hf", "ask", str(IMAGE), QUESTION)
TYPO = ("-m", "fusion_hf", "train", os.devnull, "lerning_rate=1")
TORCH = ("-c", "import torch")


def environment(checkout: Path, threads: int) -> dict[str, str]:
    """Return environment variables with which a process imports the package of a checkout."""
    values = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**values, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def timed(arguments: tuple[str, ...], variables: dict[str, str], status: int = 0) -> tuple[float, str]:
    """Return the seconds of a process from start to end, and its output."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode != status:
        raise RuntimeError(f"{arguments} ended with status {done.returncode}: {done.stderr}")
    return seconds, done.stdout.strip()


def measure(checkouts: dict[str, Path], rounds: int, threads: int) -> dict[str, list[float]]:
    """Measure the seconds of each part of each checkout in each round. The first round does not count."""
    measured: dict[str, list[float]] = defaultdict(list)
    for index in range(-1, rounds):
        found = {"torch": timed(TORCH, environment(ROOT, threads))[0]}
        for name in turned(list(checkouts), index):
            variables = environment(checkouts[name], threads)
            found[f"imports_{name}"] = float(timed(("-c", IMPORTS), variables)[1])
            found[f"ask_{name}"], answer = timed(ASK, variables)
            if answer != ANSWER:
                raise RuntimeError(f"The answer of {name} must be {ANSWER!r}, got {answer!r}.")
            found[f"typo_{name}"] = timed(TYPO, variables, status=2)[0]
        if index >= 0:
            for key, seconds in found.items():
                measured[key].append(seconds)
    return dict(measured)


def main() -> None:
    """Measure, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, metavar="DIR", help="another checkout")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    arguments = parser.parse_args()
    measured = measure({"this": ROOT, "other": arguments.other}, arguments.rounds, arguments.threads)
    parts = ("imports", "ask", "typo")
    result: dict[str, Any] = {
        "ratios": {part: paired_ratios(measured[f"{part}_this"], measured[f"{part}_other"]) for part in parts},
        "medians": {name: median(values) for name, values in measured.items()},
        "rounds": measured,
        "threads": arguments.threads,
        **surroundings("cpu"),
    }
    write_result(result, arguments.output)
    for part, ratios in result["ratios"].items():
        print(part, ratios)


if __name__ == "__main__":
    main()
