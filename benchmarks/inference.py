"""Time and memory of FUSION's inference, beside eager attention and the authors' way of computing it.

    python benchmarks/inference.py --threads 2 --output benchmarks/results/cpu.json
    python benchmarks/report.py

A round measures every variant once, in an order that changes from round to round, together with the machine's own
rates. Ratios are taken within a round, so that a slow spell of the machine falls on both sides.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import (
    DTYPES,
    check_device,
    copy_rate,
    generation_seconds,
    matmul_rate,
    paired_ratios,
    peak_allocated,
    peak_resident,
    positive,
    seconds,
    summarize,
    surroundings,
    turned,
    write_result,
)
from PIL import Image
from reference import build_reference
from report import INFERENCE, describe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from workload import SIZES, Size, build_eager, build_model, make_image_processor, make_photo, make_prompt

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.modeling_fusion_decoder import LatentUpdates

TOLERANCE = 1e-4  # relative, of float32 logits: all variants are one function
TOKENS_BETWEEN_BLOCKS = 30  # in the conversation that the samplers alone are timed on

Models = dict[str, FusionForConditionalGeneration]
Measured = dict[str, dict[str, list[float]]]  # figure -> variant -> one value per round


class Benchmark:
    """The three variants with their inputs, and everything measured so far."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device):
        self.size, self.dtype, self.device = size, dtype, device
        self.image_processor, self.photo = make_image_processor(size), make_photo(size.photo)
        self.pixel_values = self.preprocess()["pixel_values"].to(device)
        self.models = self.build_models(torch.float32)
        self.errors = self.check_equality()
        if dtype != torch.float32:
            self.models = self.build_models(dtype)
        self.prompt = make_prompt(self.models["ours"].config, self.pixel_values)
        self.measured: Measured = defaultdict(lambda: defaultdict(list))

    def build_models(self, dtype: torch.dtype) -> Models:
        """All variants share the weights of the first."""
        ours = build_model(self.size, dtype, self.device)
        return {"ours": ours, "eager": build_eager(ours), "reference": build_reference(ours)}

    def check_equality(self) -> dict[str, float]:
        """Relative errors of the prompt's logits against ours; a variant that computes something else is refused."""
        prompt = make_prompt(self.models["ours"].config, self.pixel_values)
        logits = {name: model(**prompt).logits for name, model in self.models.items()}
        errors = {
            name: ((logits[name] - logits["ours"]).norm() / logits["ours"].norm()).item()
            for name in logits
            if name != "ours"
        }
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise RuntimeError(f"The logits of {name!r} differ from ours by {error:.1e}; allowed: {TOLERANCE}.")
        return errors

    def preprocess(self) -> Any:
        return self.image_processor(self.photo, return_tensors="pt")

    def resize_twice(self) -> None:
        """What no implementation can avoid: one resize for the four tiles, one for the overview."""
        side = self.size.image_side
        for target in (2 * side, side):
            self.photo.resize((target, target), Image.Resampling.BICUBIC)

    def encode(self, model: FusionForConditionalGeneration) -> Any:
        """Both passes of the tower, connector, projectors."""
        names = ("pixel_values", "instruct_input_ids", "instruct_attention_mask")
        return model.model.encode_picture(*(self.prompt[name] for name in names))

    def prefill(self, model: FusionForConditionalGeneration) -> Any:
        return model(**self.prompt, use_cache=True, logits_to_keep=1)

    def rewrite(self, model: FusionForConditionalGeneration, hidden: torch.Tensor, updates: LatentUpdates) -> None:
        """All samplers, without the layers that they follow."""
        for index in self.size.sampler_layers:
            model.model.language_model.layers[index].vision_sampler(hidden, updates)

    def long_conversation(self) -> tuple[torch.Tensor, LatentUpdates]:
        """Hidden states and latent positions of `many_turns` turns; their values do not matter to the time."""
        size, width = self.size, self.size.text_width
        stride = size.query_len + TOKENS_BETWEEN_BLOCKS
        starts = torch.arange(size.many_turns, device=self.device) * stride
        positions = starts[:, None] + torch.arange(size.query_len, device=self.device)
        hidden = torch.randn(1, size.many_turns * stride, width, dtype=self.dtype, device=self.device)
        windows = hidden.new_ones(1, size.query_len, size.window_size**2, width)
        valid = torch.ones(1, size.many_turns, dtype=torch.bool, device=self.device)
        return hidden, LatentUpdates(windows, positions[None], (starts + stride - 1)[None], valid)

    def time_round(self, index: int) -> None:
        """One value of every time; the order of the variants turns with the round's number."""
        add = self.measured
        processors = {"ours": self.preprocess, "pil_resizes": self.resize_twice}
        for name in turned(list(processors), index):
            add["preprocessing_seconds"][name].append(seconds(processors[name], self.device))
        conversation = self.long_conversation()
        for name in turned(list(self.models), index):
            model = self.models[name]
            add["vision_seconds"][name].append(seconds(partial(self.encode, model), self.device))
            first, later = generation_seconds(model, self.prompt, self.size.new_tokens)
            add["first_token_seconds"][name].append(first)
            add["per_token_seconds"][name].append(later)
            elapsed = seconds(partial(self.rewrite, model, *conversation), self.device)
            add["samplers_seconds"][name].append(elapsed)
        rate = matmul_rate(self.size.matrix_side, self.dtype, self.device)
        add["machine"]["matmul_flops_per_second"].append(rate)
        add["machine"]["copy_bytes_per_second"].append(copy_rate(self.size.copied_bytes, self.device))

    def memory_round(self, index: int) -> None:
        """How much each phase adds to the process's resident memory, above the weights and its inputs."""
        for name, phase, function in self.phases(index):
            grown = peak_resident(function, self.device)
            if grown is not None:
                self.measured[f"{phase}_resident_bytes"][name].append(grown)

    def count_allocations(self) -> None:
        """How much each phase allocates: the same in every run, so once is enough."""
        for name, phase, function in self.phases():
            self.measured[f"{phase}_allocated_bytes"][name].append(peak_allocated(function, self.device))

    def phases(self, index: int = 0) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        """Variant, name and call of what is measured for its memory. Decoding needs little but the cache."""
        for name in turned(list(self.models), index):
            model = self.models[name]
            yield name, "vision", partial(self.encode, model)
            yield name, "first_token", partial(self.prefill, model)

    def work(self) -> dict[str, int]:
        """What a prompt and a token must at least do: operations of matrix products, and bytes of weights read."""
        model = self.models["ours"]
        # the counter knows attention only where it is made of products; causal attention counts in full
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.prefill(model)
        read = [*model.model.language_model.layers.parameters(), *model.lm_head.parameters()]
        idle = [
            parameter
            for index in self.size.sampler_layers
            for parameter in model.model.language_model.layers[index].vision_sampler.parameters()
        ]
        return {
            "prefill_flops": counter.get_total_flops(),
            "bytes_per_token": sum(x.nbytes for x in read) - sum(x.nbytes for x in idle),
        }


def compare(measured: Measured, work: dict[str, int]) -> dict[str, Any]:
    """Ratios of ours to each other variant, and fractions of the machine's rates, both paired by round."""
    ratios = {
        figure: {name: paired_ratios(variants["ours"], values) for name, values in variants.items() if name != "ours"}
        for figure, variants in measured.items()
        if figure != "machine"
    }
    fractions = {}
    for figure, amount, rate in (
        ("first_token_seconds", "prefill_flops", "matmul_flops_per_second"),
        ("per_token_seconds", "bytes_per_token", "copy_bytes_per_second"),
    ):
        fractions[figure] = {
            name: summarize(
                [work[amount] / time / peak for time, peak in zip(times, measured["machine"][rate], strict=True)]
            )
            for name, times in measured[figure].items()
        }
    return {"ratios": ratios, "machine_fractions": fractions}


def run(size: str, dtype: str, device: str, repeats: int, threads: int) -> dict[str, Any]:
    """The whole benchmark; its result is what the JSON file holds."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        benchmark = Benchmark(SIZES[size], DTYPES[dtype], torch.device(device))
        benchmark.time_round(0)  # warms everything up and is thrown away
        benchmark.measured.clear()
        for index in tqdm(range(repeats), desc="time"):
            benchmark.time_round(index)
        for index in tqdm(range(repeats), desc="memory"):
            benchmark.memory_round(index)
        benchmark.count_allocations()
        work = benchmark.work()
    measured = {figure: dict(variants) for figure, variants in benchmark.measured.items()}
    medians = {
        figure: {name: median(values) for name, values in variants.items()} for figure, variants in measured.items()
    }
    return {
        "settings": {"size": size, "dtype": dtype, "device": device, "repeats": repeats, "threads": threads},
        **surroundings(device),
        "prompt_tokens": benchmark.prompt["input_ids"].shape[1],
        "work": work,
        "relative_errors": benchmark.errors,
        **compare(measured, work),
        "medians": medians,
        "repeats": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="middle", help="tiny is for tests")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds that count; one more warms up")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--output", type=Path, help="JSON file for the result, e.g. benchmarks/results/cpu.json")
    arguments = parser.parse_args()
    check_device(parser, arguments.device)
    result = run(arguments.size, arguments.dtype, arguments.device, arguments.repeats, arguments.threads)
    write_result(result, arguments.output)
    print(describe(INFERENCE, result))


if __name__ == "__main__":
    main()
