"""Time and memory of FUSION's inference, beside other ways of computing it and beside peers of transformers.

    python benchmarks/inference.py --threads 2 --output benchmarks/results/cpu.json
    python benchmarks/inference.py --device cuda --size 3b --dtype bfloat16 --batches 1,32 --profile \\
        --output benchmarks/results/cuda_3b.json
    python benchmarks/report.py

A round measures every contestant once, in an order that changes from round to round, together with the machine's own
rates. Ratios are taken within a round, so that a slow spell of the machine falls on both sides. Growth and throughput
take long and have fewer rounds of their own. Everything has random weights: nothing is downloaded.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from blocks import describe
from contestants import (
    COMPILED,
    EAGER,
    GENERATORS,
    NAMES,
    OURS,
    REFERENCE,
    Contestant,
    build_contestants,
    cache_bytes,
    default_names,
    missing_originals,
    prefill_flops,
    weight_bytes,
)
from growth import measure_growth
from measure import (
    DTYPES,
    check_device,
    clocked,
    copy_rate,
    generation_seconds,
    matmul_rate,
    names_among,
    numbers,
    paired_ratios,
    positive,
    read_rate,
    seconds,
    summarize,
    surroundings,
    turned,
    write_result,
)
from memory import peak_allocated, peak_resident
from PIL import Image
from profiling import describe_operations, profile_contestant
from report import COMPARISON, INFERENCE
from throughput import BATCHES, measure_throughput
from tqdm import tqdm
from workload import ONE_QUESTION, SIZES, Size, build_model, make_image_processor, make_photo

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_decoder import LatentUpdates

TOLERANCE = 1e-4  # relative tolerance of float32 logits, since all ways of computing FUSION are the same function
TOKENS_BETWEEN_BLOCKS = 30  # number of turns in the conversation for timing the samplers
FUSIONS = (OURS, EAGER, REFERENCE)

Measured = dict[str, dict[str, list[float]]]  # figure -> contestant -> one value per round


class Benchmark:
    """The contestants with their inputs, and all measurements so far."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device, names: list[str]):
        self.size, self.dtype, self.device, self.names = size, dtype, device, names
        self.image_processor, self.photo = make_image_processor(size), make_photo(size.photo)
        self.pixel_values = self.preprocess()["pixel_values"].to(device)
        self.errors = self.check_equality()
        self.contestants = self.build(names, dtype)
        self.prompts = {name: contestant.prompt(ONE_QUESTION) for name, contestant in self.contestants.items()}
        self.measured: Measured = defaultdict(lambda: defaultdict(list))

    def build(self, names: list[str], dtype: torch.dtype) -> dict[str, Contestant]:
        """Build contestants that share the weights of one language model."""
        model = build_model(self.size, dtype, self.device)
        return build_contestants(names, model, self.pixel_values.to(dtype), self.size.new_tokens)

    def check_equality(self) -> dict[str, float]:
        """
        Return the relative errors of the prompt's logits in float32 compared with FUSION's. A contestant that
        must compute FUSION but gives other results is an error.
        """
        fusions = [name for name in self.names if name in FUSIONS]
        if len(fusions) == 1:
            return {}
        contestants = self.build(fusions, torch.float32)
        logits = {name: fusion.model(**fusion.prompt(ONE_QUESTION)).logits for name, fusion in contestants.items()}
        errors = {
            name: ((logits[name] - logits[OURS]).norm() / logits[OURS].norm()).item()
            for name in logits
            if name != OURS
        }
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"The logits of {name!r} may differ from ours by at most {TOLERANCE}, got {error:.1e}."
                )
        return errors

    def preprocess(self) -> Any:
        return self.image_processor(self.photo, return_tensors="pt")

    def resize_twice(self) -> None:
        """Measure what no implementation can avoid: one resize for the four tiles, and one for the overview."""
        side = self.size.image_side
        for target in (2 * side, side):
            self.photo.resize((target, target), Image.Resampling.BICUBIC)

    def encode(self, name: str) -> Any:
        """Run the tower, connector and projectors on a prompt's image."""
        prompt, contestant = self.prompts[name], self.contestants[name]
        if name in FUSIONS:
            given = {key: prompt[key] for key in ("pixel_values", "instruct_input_ids", "instruct_attention_mask")}
        else:
            given = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
        return getattr(contestant.encoder, contestant.method)(**given)

    def rewrite(self, model: FusionForConditionalGeneration, hidden: torch.Tensor, updates: LatentUpdates) -> None:
        """Run all samplers without the layers before them."""
        for index in self.size.sampler_layers:
            model.model.language_model.layers[index].vision_sampler(hidden, updates)

    def long_conversation(self) -> tuple[torch.Tensor, LatentUpdates]:
        """Return hidden states and latent positions of `many_turns` turns. Their values do not affect the time."""
        size, width = self.size, self.size.text_width
        stride = size.query_len + TOKENS_BETWEEN_BLOCKS
        starts = torch.arange(size.many_turns, device=self.device) * stride
        positions = starts[:, None] + torch.arange(size.query_len, device=self.device)
        hidden = torch.randn(1, size.many_turns * stride, width, dtype=self.dtype, device=self.device)
        windows = hidden.new_ones(1, size.query_len, size.window_size**2, width)
        valid = torch.ones(1, size.many_turns, dtype=torch.bool, device=self.device)
        return hidden, LatentUpdates(windows, positions[None], (starts + stride - 1)[None], valid)

    def time_round(self, index: int) -> None:
        """Measure every time once. The order of the contestants rotates with the number of the round."""
        add = self.measured
        processors = {"ours": self.preprocess, "pil_resizes": self.resize_twice}
        for name in turned(list(processors), index):
            add["preprocessing_seconds"][name].append(seconds(processors[name], self.device))
        conversation = self.long_conversation()
        for name in turned(list(self.contestants), index):
            self.time_generation(name)
            if name in FUSIONS:
                model = self.contestants[name].model
                elapsed = seconds(partial(self.rewrite, model, *conversation), self.device)
                add["samplers_seconds"][name].append(elapsed)
        rates = add["machine"]
        rates["matmul_flops_per_second"].append(matmul_rate(self.size.matrix_side, self.dtype, self.device))
        rates["copy_bytes_per_second"].append(copy_rate(self.size.copied_bytes, self.device))
        rates["read_bytes_per_second"].append(read_rate(self.size.copied_bytes, self.device))

    def time_generation(self, name: str) -> None:
        """Measure the time of the prompt, of encoding its image alone, and of decoding, all within one call."""
        contestant, add = self.contestants[name], self.measured
        if contestant.generator is not None:  # parts of a graph cannot be timed separately
            first, later = generation_seconds(contestant.generator, self.prompts[name], self.size.new_tokens)
            add["first_token_seconds"][name].append(first)
            add["per_token_seconds"][name].append(later)
            return
        with clocked(contestant.encoder, contestant.method, self.device) as encoding:
            first, later = generation_seconds(
                contestant.model, self.prompts[name], self.size.new_tokens, **contestant.options
            )
        add["vision_seconds"][name].append(sum(encoding))
        add["first_token_seconds"][name].append(first)
        add["per_token_seconds"][name].append(later)

    def memory_round(self, index: int) -> None:
        """Measure how much a prompt adds to the resident memory, above the weights and its inputs."""
        for name in turned([name for name in self.contestants if name in FUSIONS], index):
            prefill = partial(self.contestants[name].prefill, self.prompts[name])
            grown = peak_resident(prefill, self.device)
            if grown is not None:
                self.measured["first_token_resident_bytes"][name].append(grown)

    def count_allocations(self) -> None:
        """Count how much each phase allocates, once, since it is the same in every run."""
        for name, phase, function in self.phases():
            self.measured[f"{phase}_allocated_bytes"][name].append(peak_allocated(function, self.device))

    def phases(self) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        """
        Yield the contestant, name and call of each phase whose memory is measured. Decoding needs little beyond
        the cache.
        """
        for name, contestant in self.contestants.items():
            if name not in COMPILED:
                yield name, "vision", partial(self.encode, name)
                yield name, "first_token", partial(contestant.prefill, self.prompts[name])

    def work(self) -> dict[str, dict[str, int]]:
        """
        Return the minimum work of a prompt and a token: operations, and bytes of weights and cache that are
        read.
        """
        work: dict[str, dict[str, int]] = {"prefill_flops": {}, "bytes_per_token": {}}
        weights = weight_bytes(self.contestants[OURS].model)
        for name, contestant in self.contestants.items():
            same = OURS if name in FUSIONS else COMPILED.get(name, name)  # the reference for the amount of work
            if same not in work["prefill_flops"]:
                work["prefill_flops"][same] = prefill_flops(self.contestants[same], self.prompts[same])
            work["prefill_flops"][name] = work["prefill_flops"][same]
            length = self.prompts[name]["input_ids"].shape[1] + self.size.new_tokens / 2
            work["bytes_per_token"][name] = weights + cache_bytes(contestant, length)
        return work


def compare(measured: Measured, work: dict[str, dict[str, int]]) -> dict[str, Any]:
    """
    Return the ratios of FUSION to every other contestant, and fractions of the machine's rates, both paired by
    round.
    """
    ratios = {
        figure: {name: paired_ratios(variants[OURS], values) for name, values in variants.items() if name != OURS}
        for figure, variants in measured.items()
        if figure != "machine"
    }
    fractions = {}
    for fraction, figure, amount, rate in (
        ("prefill_of_matrix_rate", "first_token_seconds", "prefill_flops", "matmul_flops_per_second"),
        ("decoding_of_copy_rate", "per_token_seconds", "bytes_per_token", "copy_bytes_per_second"),
        ("decoding_of_read_rate", "per_token_seconds", "bytes_per_token", "read_bytes_per_second"),
    ):
        fractions[fraction] = {
            name: summarize(
                [work[amount][name] / time / peak for time, peak in zip(times, measured["machine"][rate], strict=True)]
            )
            for name, times in measured[figure].items()
        }
    return {"ratios": ratios, "machine_fractions": fractions}


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that takes rounds. `repeats` is the number of rounds for times."""
    benchmark.time_round(0)  # warm-up and compilation; the result is discarded
    benchmark.measured.clear()
    for index in tqdm(range(arguments.repeats), desc="time", unit="round"):
        benchmark.time_round(index)
    for index in tqdm(range(arguments.slow_repeats), desc="memory", unit="round"):
        benchmark.memory_round(index)
    benchmark.count_allocations()
    contestants, device = benchmark.contestants, benchmark.device
    result: dict[str, Any] = {
        "growth_seconds": measure_growth(contestants, arguments.slow_repeats, device),
        "tokens_per_second": measure_throughput(contestants, arguments.batches, arguments.slow_repeats, device),
    }
    if arguments.profile:
        names = [name for name in contestants if name in (OURS, *COMPILED) and name not in GENERATORS]
        tokens = benchmark.size.new_tokens
        result["profile"] = {name: profile_contestant(contestants[name], tokens, device) for name in names}
    return result


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the whole benchmark, and return the content of the JSON file."""
    torch.set_num_threads(arguments.threads)
    size, device = SIZES[arguments.size], torch.device(arguments.device)
    names = arguments.models or default_names(size)
    with torch.no_grad():
        benchmark = Benchmark(size, DTYPES[arguments.dtype], device, names)
        slow = measure(benchmark, arguments)
        work = benchmark.work()
    return describe_run(benchmark, arguments, slow, work)


def describe_run(
    benchmark: Benchmark, arguments: argparse.Namespace, slow: dict[str, Any], work: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Return the content of the JSON file for the measurements so far. `slow` has those with rounds of their own."""
    measured = {figure: dict(variants) for figure, variants in benchmark.measured.items()}
    medians = {
        figure: {name: median(values) for name, values in variants.items()} for figure, variants in measured.items()
    }
    settings = ("size", "dtype", "device", "repeats", "slow_repeats", "batches", "threads")
    lengths = {name: prompt["input_ids"].shape[1] for name, prompt in benchmark.prompts.items()}
    return {
        "settings": {name: getattr(arguments, name) for name in settings},
        **surroundings(arguments.device),
        "prompt_tokens": lengths[OURS],
        "contestants": {
            name: {
                "prompt_tokens": lengths[name],
                "picture_tokens": contestant.picture_tokens,
                "tiles": contestant.tiles,
            }
            for name, contestant in benchmark.contestants.items()
        },
        "work": work,
        "relative_errors": benchmark.errors,
        **compare(measured, work),
        "medians": medians,
        "repeats": measured,
        **slow,
    }


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=SIZES, default="middle", help="size of the model; 3b and 8b need a GPU, tiny is for tests"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--models", type=names_among(NAMES), help=f"contestants out of {','.join(NAMES)}; default: depends on the size"
    )
    parser.add_argument(
        "--batches", type=numbers, default=list(BATCHES), help="batch sizes for the throughput, such as 1,4,16"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="number of rounds after one warm-up round")
    parser.add_argument(
        "--slow-repeats", type=positive, default=2, help="number of rounds for memory, growth and throughput"
    )
    parser.add_argument("--profile", action="store_true", help="also profile the time by operation")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file for the result, e.g. benchmarks/results/cpu.json")
    arguments = parser.parse_args(command_line)
    check_device(parser, arguments.device)
    missing = missing_originals(arguments.models) if arguments.models else []
    if missing:
        parser.error(f"--models: {', '.join(missing)} must be among them, for others are compared with it")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    result = run(arguments)
    write_result(result, arguments.output)
    for table in (INFERENCE, COMPARISON):
        print(describe(table, result))
    for name, profiles in result.get("profile", {}).items():
        print(f"\n{name}\n{describe_operations(profiles)}")


if __name__ == "__main__":
    main()
