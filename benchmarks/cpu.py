"""Compare float32 and bfloat16 on one CPU, with torch's own matrix products and with oneDNN's.

    python benchmarks/cpu.py --threads 2 --output benchmarks/results/types_cpu.json
    python benchmarks/report.py

Times are measured on the FUSION model with random weights of `inference.py`. Each round measures every variant once,
in an order that changes from round to round, and ratios are taken within a round. All variants of a dtype share their
weights. Accuracy is that of fusion-nano on test questions. With `--only`, the other parts of the output are kept.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    DTYPES,
    generation_seconds,
    paired_ratios,
    positive,
    read_result,
    seconds,
    surroundings,
    turned,
    write_result,
)
from token_budget import choose_records
from torch import nn
from tqdm import tqdm
from workload import (
    SIZES,
    Prompt,
    Request,
    Size,
    build_model,
    make_image_processor,
    make_photo,
    make_prompt,
    sharing_copy,
)

from fusion_hf import FusionForConditionalGeneration, use_onednn
from fusion_hf.inference import ChatModel
from fusion_hf.inference.cpu_linear import SMALLEST_WEIGHT, OneDNNLinear
from fusion_hf.inference.cpu_speed import is_bfloat16_faster
from fusion_hf.nano.evaluate import generate_answers

BASE = "float32"
CHOSEN, ALL = "oneDNN where it is faster", "oneDNN for all products"
EIGHT = 8  # number of questions, each about an image of its own
EIGHT_TOKENS = 8  # length of each answer
PARTS = ("times", "eight", "accuracy")
CPU = torch.device("cpu")


def take_all(model: FusionForConditionalGeneration) -> None:
    """Let oneDNN compute all products, even where it is slower."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= SMALLEST_WEIGHT:
            module.__class__ = OneDNNLinear


class Times:
    """The variants, their questions, and the measurements: figure -> variant -> rounds."""

    def __init__(self, size: Size) -> None:
        self.new_tokens = size.new_tokens
        self.models: dict[str, FusionForConditionalGeneration] = {}
        pixel_values = make_image_processor(size)(make_photo(size.photo), return_tensors="pt")["pixel_values"]
        for dtype in ("float32", "bfloat16"):
            self.models[dtype] = build_model(size, DTYPES[dtype], CPU)
            self.models[f"{dtype}, {CHOSEN}"] = sharing_copy(self.models[dtype])
            use_onednn(self.models[f"{dtype}, {CHOSEN}"])
        forced = sharing_copy(self.models[f"{BASE}, {CHOSEN}"])
        take_all(forced)
        self.models[f"{BASE}, {ALL}"] = forced
        config = forced.config
        self.one, self.eight = (
            {name: make_prompt(config, pixel_values.to(model.dtype), request) for name, model in self.models.items()}
            for request in (Request(), Request(batch=EIGHT))
        )
        self.measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def round(self, index: int) -> None:
        for name in turned(list(self.models), index):
            model, prompt = self.models[name], self.one[name]
            first, later = generation_seconds(model, prompt, self.new_tokens)
            self.add("first_token_seconds", name, first)
            self.add("per_token_seconds", name, later)
            tiles = partial(model.get_global_features, prompt["pixel_values"])
            self.add("four_tiles_seconds", name, seconds(tiles, CPU))

    def eight_round(self, index: int) -> None:
        names = [name for name in self.models if not name.endswith(ALL)]
        for name in turned(names, index):
            self.add("eight_questions_seconds", name, seconds(partial(self.answer, name, self.eight[name]), CPU))

    def answer(self, name: str, prompt: Prompt, new_tokens: int = EIGHT_TOKENS) -> torch.Tensor:
        """Generate the answers of a batch."""
        return self.models[name].generate(**prompt, max_new_tokens=new_tokens, do_sample=False)

    def add(self, figure: str, name: str, value: float) -> None:
        self.measured[figure][name].append(value)

    def errors(self) -> dict[str, dict[str, float]]:
        """Return the relative errors of the tiles' features and of the first token's logits compared with the base."""
        outputs: dict[str, Callable[[str], torch.Tensor]] = {
            "features": lambda name: self.models[name].get_global_features(self.one[name]["pixel_values"]),
            "logits": lambda name: self.models[name](**self.one[name], logits_to_keep=1).logits,
        }
        found: dict[str, dict[str, float]] = {}
        for figure, output in outputs.items():
            expected = output(BASE)
            found[figure] = {
                name: ((output(name).float() - expected).norm() / expected.norm()).item()
                for name in self.models
                if name != BASE
            }
        return found

    def equal_answers(self) -> dict[str, bool]:
        """Return whether oneDNN gives the same tokens as the same dtype without it."""
        ids = {name: self.answer(name, self.one[name], self.new_tokens) for name in self.models}
        return {name: torch.equal(ids[name], ids[name.partition(",")[0]]) for name in ids if "," in name}


def measure_times(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one question about one image."""
    with torch.inference_mode():
        times = Times(SIZES[options.size])
        found = {"errors": times.errors(), "equal_answers": times.equal_answers()}  # warm-up rounds
        for index in tqdm(range(options.repeats), desc="times", unit="round"):
            times.round(index)
    return describe_times(options, times) | found | {"is_bfloat16_faster": is_bfloat16_faster()}


def measure_eight(options: argparse.Namespace) -> dict[str, Any]:
    """Measure eight questions about different images in one batch."""
    with torch.inference_mode():
        times = Times(SIZES[options.size])
        for name in times.models:  # warms up
            times.answer(name, times.one[name])
        for index in tqdm(range(options.eight_repeats), desc="eight questions", unit="round"):
            times.eight_round(index)
    return describe_times(options, times)


def describe_times(options: argparse.Namespace, times: Times) -> dict[str, Any]:
    """Describe the measurements and their conditions, with ratios to the base."""
    return {
        "settings": {name: getattr(options, name) for name in ("size", "repeats", "eight_repeats", "threads")},
        **surroundings("cpu"),
        "ratios": {
            figure: {name: paired_ratios(values, variants[BASE]) for name, values in variants.items() if name != BASE}
            for figure, variants in times.measured.items()
        },
        "repeats": times.measured,
    }


def measure_accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """Count exact answers of fusion-nano by category, in both dtypes."""
    records, right = choose_records(options.questions, options.drawn), {}
    for dtype in ("float32", "bfloat16"):
        chat_model = ChatModel.load(device="cpu", dtype=dtype)
        answers = generate_answers(chat_model.model, chat_model.processor, records)
        found = Counter(r.category for r, answer in zip(records, answers, strict=True) if answer == r.turns[0][1])
        right[dtype] = dict(sorted(found.items()))
    return {
        "settings": {name: getattr(options, name) for name in ("questions", "drawn", "threads")},
        **surroundings("cpu"),
        "asked": dict(sorted(Counter(record.category for record in records).items())),
        "right": right,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="part to measure; default: all")
    parser.add_argument("--size", choices=SIZES, default="middle", help="size of the model")
    parser.add_argument("--repeats", type=positive, default=5, help="number of rounds with one question")
    parser.add_argument("--eight-repeats", type=positive, default=2, help="number of rounds with eight questions")
    parser.add_argument("--questions", type=positive, default=1000, help="number of easy-vqa questions")
    parser.add_argument("--drawn", type=positive, default=150, help="number of drawn images per category")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = read_result(options.output)
    measures = {"times": measure_times, "eight": measure_eight, "accuracy": measure_accuracy}
    for part in PARTS:
        if options.only in (None, part):
            result[part] = measures[part](options)
            write_result(result, options.output)
            print(json.dumps({key: value for key, value in result[part].items() if key != "repeats"}, indent=1))
    return result


if __name__ == "__main__":
    main()
