"""Clocks, memory, the machine's own rates and its name, and how rounds are ordered and summarized."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from fusion_hf.inference.devices import DTYPES

MATRIX_PRODUCTS = 4  # repetitions in one measurement of the machine's rate
READ_COLUMNS = 1024  # size of the matrix that is read
PACKAGES = ("transformers", "numpy", "pillow")

Spread = dict[str, float]


def synchronize(device: torch.device) -> None:
    """Wait for the work that was submitted to an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


class TokenClock(BaseStreamer):
    """Record when `generate` delivers the prompt and each token. They are on the CPU by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def clocked(module: torch.nn.Module, method: str, device: torch.device) -> Iterator[list[float]]:
    """Append the seconds of every call of a module's method to a list while the context is active."""
    original = getattr(module, method)
    times: list[float] = []

    @wraps(original)  # `generate` inspects the parameters
    def call(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        times.append(seconds(lambda: results.append(original(*args, **kwargs)), device))
        return results[0]

    setattr(module, method, call)  # hides the method of the class for this module only
    try:
        yield times
    finally:
        delattr(module, method)


def generation_seconds(
    model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, **options: Any
) -> tuple[float, float]:
    """Return the time to the first token, and the mean time of each later one, of one greedy `model.generate`."""
    clock = TokenClock()
    synchronize(inputs["input_ids"].device)
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, **options)
    first, last = clock.times[1], clock.times[-1]  # times[0] belongs to the prompt
    return first - start, (last - first) / (new_tokens - 1)


def matmul_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the floating-point operations per second of a product of two square matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    def products() -> None:
        for _ in range(MATRIX_PRODUCTS):
            torch.mm(left, right, out=out)

    return MATRIX_PRODUCTS * 2 * side**3 / seconds(products, device)


def copy_rate(size: int, device: torch.device) -> float:
    """Return the bytes per second of a copy, with each byte counted as one read and one write."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # written before, so that the copy needs no new pages
    return 2 * size / seconds(lambda: target.copy_(source), device)


def read_rate(size: int, device: torch.device) -> float:
    """
    Return the bytes per second that are read without writing, by a sum or a matrix-vector product, whichever is
    faster.
    """
    matrix = torch.ones(size, dtype=torch.uint8, device=device).view(torch.float32).view(-1, READ_COLUMNS)
    vector = matrix.new_ones(READ_COLUMNS)
    return size / min(seconds(matrix.sum, device), seconds(lambda: torch.mv(matrix, vector), device))


def turned(items: list[str], index: int) -> list[str]:
    """Return the list, starting at another position in every round."""
    start = index % len(items)
    return items[start:] + items[:start]


def summarize(values: Sequence[float]) -> Spread:
    return {"median": median(values), "min": min(values), "max": max(values)}


def paired_ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Return the ratios of two figures of the same rounds, so that a slow phase of the machine affects both."""
    return summarize([value / other for value, other in zip(values, others, strict=True)])


def surroundings(device: str, more: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Describe the conditions of a result, including the versions of `more` packages."""
    return {
        "machine": {"device": device_name(device), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in (*PACKAGES, *more)},
            "torch": torch.__version__,
        },
    }


def device_name(device: str) -> str:
    """Return the model of the processor or accelerator."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def positive(text: str) -> int:
    """Parse a positive integer of a command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def names_among(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser for comma-separated names of a command line."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"must be one of {', '.join(allowed)}, got {name!r}")
        return list(dict.fromkeys(names))

    return parse


def numbers(text: str) -> list[int]:
    """Parse comma-separated positive integers of a command line."""
    return [positive(number) for number in text.split(",")]


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Exit with a usage error if the machine has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the device and for the output file."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file for the result")


def parse_on_machine(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the options of a parser with `add_machine_options`, and set the number of threads."""
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    torch.set_num_threads(options.threads)
    return options


def read_result(path: Path | None) -> dict[str, Any]:
    """Read an existing file, whose parts are kept unless they are measured again."""
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """Write a result to a JSON file, if one was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
