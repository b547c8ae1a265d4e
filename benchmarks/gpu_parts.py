"""The parts of `gpu.py`, each of which uses the code of another benchmark."""

import argparse
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import inference
import quantization
import torch
import training
from contestants import COMPILED
from gpu_schedule import Emit, Part
from growth import measure_growth
from measure import DTYPES, surroundings
from steps import StepBenchmark
from throughput import measure_throughput
from workload import SIZES, TRAINING_SIZES

ROOT = Path(__file__).parents[1]
REPORTED = re.compile(r"(tests/\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)")
REASON = re.compile(r"(?:FAILED|ERROR) (tests/\S+\.py::.+?) - (.*)")
# compiled contestants in order of importance, each of which takes about a minute
FIRST = ("ours", "llava_onevision_tiled", "llava_onevision", "smolvlm")
LATER = ("ours_ahead", "ours_prompt_compiled", "ours_compiled", "llava_onevision_compiled")
WARM_UP = 0


@dataclass(frozen=True)
class Setting:
    """
    Where and at which sizes everything is measured.

    Args:
        sizes: the sizes that stand for the two published models.
        files: the file that each part writes.
        checks: pytest's arguments for the part of this name.
        tests: pytest's arguments for the part of this name.
        patience: a factor for the time limits of the parts.
    """

    device: str
    sizes: dict[str, str]
    dtype: str
    rounds: int
    batches: tuple[int, ...]
    files: dict[str, str]
    checks: tuple[str, ...]
    tests: tuple[str, ...]
    compiles: bool = True
    patience: int = 1


GPU = Setting(
    device="cuda",
    sizes={"3b": "3b", "8b": "8b"},
    dtype="bfloat16",
    rounds=3,
    batches=(1, 32),
    files={
        "inference_3b": "cuda_3b.json",
        "inference_8b": "cuda_8b.json",
        "training_3b": "training_cuda_3b.json",
        "training_8b": "training_cuda_8b.json",
        "quantization": "quantization_cuda.json",
    },
    checks=("-m", "gpu", "tests/model", "tests/gpu/test_cuda.py"),
    tests=("-m", "gpu", "--ignore=tests/vllm", "tests"),
)
# runs all code, but the times have no meaning
SMALL = Setting(
    device="cpu",
    sizes={"3b": "tiny", "8b": "tiny"},
    dtype="float32",
    rounds=1,
    batches=(1, 2),
    files={name: f"small_{file}" for name, file in GPU.files.items()},
    checks=("-m", "not gpu and not slow", "tests/model/test_tower_in_one_pass.py", "-k", "given or chosen"),
    tests=("-m", "not gpu and not slow", "tests/model/test_tower_in_one_pass.py", "-k", "missing"),
    compiles=False,
    patience=10,
)


def make_parts(setting: Setting) -> list[Part]:
    """Return all parts in the order of their importance. Together they may exceed the available time."""

    def part(name: str, limit: float, least: float, function: Any, *given: Any) -> Part:
        return Part(name, limit * setting.patience, least, partial(function, setting, *given))

    return [
        part("machine", 20, 5, note_machine),
        part("checks", 60, 20, run_tests, setting.checks),
        part("inference_3b", 120, 30, measure_inference, "3b"),
        part("training_3b", 60, 25, measure_training, "3b"),
        part("inference_8b", 120, 30, measure_inference, "8b"),
        part("training_8b", 60, 25, measure_training, "8b"),
        part("quantization", 45, 20, measure_quantization),
        part("vllm", 90, 30, run_vllm_tests),
        part("tests", 300, 15, run_tests, setting.tests),
    ]


def options_of(setting: Setting, size: str, **more: Any) -> argparse.Namespace:
    """Return options as the command lines of the other benchmarks give them."""
    return argparse.Namespace(
        size=size,
        device=setting.device,
        dtype=setting.dtype,
        repeats=setting.rounds,
        rounds=setting.rounds,
        slow_repeats=1,
        batches=list(setting.batches),
        threads=torch.get_num_threads(),
        **more,
    )


def note_machine(setting: Setting, emit: Emit) -> None:
    """Record the name of the machine and the versions."""
    emit(surroundings(setting.device))


def measure_inference(setting: Setting, name: str, emit: Emit) -> None:
    """Measure time to first token, decoding, batches and growth, starting with what needs no compilation."""
    if not setting.compiles:
        torch.compiler.set_stance("force_eager")
    options = options_of(setting, setting.sizes[name])
    device, file = torch.device(setting.device), setting.files[f"inference_{name}"]
    slow: dict[str, Any] = {"equal_tokens": {}, "errors": {}}
    with torch.no_grad():
        benchmark = inference.Benchmark(SIZES[options.size], DTYPES[options.dtype], device, [*FIRST, *LATER])
        later = {key: benchmark.contestants.pop(key) for key in LATER}
        work = benchmark.work()

        def rounds() -> None:
            benchmark.measured.clear()
            for index in range(options.repeats):
                benchmark.time_round(index)
            emit(inference.describe_run(benchmark, options, slow, work), file)

        benchmark.time_round(WARM_UP)
        rounds()
        slow["tokens_per_second"] = measure_throughput(benchmark.contestants, options.batches, 1, device)
        emit(inference.describe_run(benchmark, options, slow, work), file)
        for key, contestant in later.items():
            benchmark.contestants[key] = contestant
            try:
                slow["equal_tokens"][key] = count_equal_tokens(benchmark, key)
            except RuntimeError as error:  # raised by compilation and by missing memory
                slow["errors"][key] = str(error)
                del benchmark.contestants[key]
                continue
            work = benchmark.work()
            rounds()
        benchmark.count_allocations()
        slow["growth_seconds"] = measure_growth(benchmark.contestants, 1, device)
        emit(inference.describe_run(benchmark, options, slow, work), file)
    emit({"equal_tokens": slow["equal_tokens"], "errors": slow["errors"]})


def count_equal_tokens(benchmark: inference.Benchmark, name: str) -> dict[str, int]:
    """
    Count the tokens that equal those of the plain model before the first difference.

    With random weights in bfloat16, two logits may be so close that rounding decides. Exact comparisons are in the
    tests.
    """
    tokens = benchmark.size.new_tokens
    rows = []
    for key in (COMPILED[name], name):
        contestant, prompt = benchmark.contestants[key], benchmark.prompts[key]
        if contestant.generator is None:
            ids = contestant.generate(prompt, tokens)
        else:
            ids = contestant.generator.generate(**prompt, max_new_tokens=tokens, do_sample=False)
        rows.append(ids[0, prompt["input_ids"].shape[1] :].tolist())
    pairs = list(zip(*rows, strict=True))
    equal = next((place for place, (plain, compiled) in enumerate(pairs) if plain != compiled), len(pairs))
    return {"equal": equal, "of": len(pairs)}


def measure_training(setting: Setting, name: str, emit: Emit) -> None:
    """
    Measure training steps with and without checkpointing: 3B as recipes train it, and 8B with all states in 16
    bits.
    """
    autocast = setting.device == "cuda" and name == "3b"
    options = options_of(setting, setting.sizes[name], autocast=autocast)
    options.dtype = "float32" if autocast else setting.dtype
    device, file = torch.device(setting.device), setting.files[f"training_{name}"]
    result = training.describe_settings(options)
    benchmark = StepBenchmark(TRAINING_SIZES[options.size], DTYPES[options.dtype], device, autocast)
    for index in range(options.rounds):
        benchmark.time_round(index)
        emit(result | {"step": benchmark.result()}, file)
    benchmark.measure_memory()
    emit(result | {"step": benchmark.result()}, file)


def measure_quantization(setting: Setting, emit: Emit) -> None:
    """Measure memory and times, if both libraries are installed."""
    missing = [name for name in ("bitsandbytes", "torchao", "accelerate") if find_spec(name) is None]
    if missing:
        emit({"missing": missing})
        return
    options = options_of(setting, "tiny" if setting is SMALL else "middle", questions=0)
    device = torch.device(setting.device)
    with torch.inference_mode():
        measured = quantization.measure_times(options, DTYPES[options.dtype], device)
    times = {"settings": vars(options), **surroundings(setting.device, ("bitsandbytes", "torchao")), **measured}
    emit({"times": times}, setting.files["quantization"])


def run_vllm_tests(setting: Setting, emit: Emit) -> None:
    """Run the tests of vLLM, including those of its graphs."""
    if find_spec("vllm") is None:
        emit({"missing": ["vllm"]})
        return
    run_tests(setting, ("-W", "default::FutureWarning", "-m", "gpu", "tests/vllm"), emit)


def run_tests(setting: Setting, arguments: tuple[str, ...], emit: Emit) -> None:
    """Run tests with pytest, and return how many passed and the messages of the others."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--no-header", "-p", "no:cacheprovider", *arguments]
    counts: Counter[str] = Counter()
    failed: dict[str, str] = {}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if (told := REPORTED.match(line)) is not None:
            counts[told[2].lower()] += 1
            if told[2] in ("FAILED", "ERROR"):
                failed[told[1]] = told[2]
            emit({"tests": dict(counts), "failed": failed})
        elif (reason := REASON.match(line)) is not None:
            failed[reason[1]] = reason[2]
    status = process.wait()
    emit({"tests": dict(counts), "failed": failed})
    if status != 0:
        raise RuntimeError(f"pytest ended with status {status}: {lines[-1] if lines else 'it wrote nothing'}")
