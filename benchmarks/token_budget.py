"""Time, memory and accuracy over the token budget: latent tokens per question, and the grid of image tokens.

    python benchmarks/token_budget.py --threads 1 --output benchmarks/results/token_budget_cpu.json
    python benchmarks/token_budget.py --only times --threads 1 --output benchmarks/results/token_budget_cpu.json
    python benchmarks/report.py

Times and memory are of the FUSION with random weights of `inference.py`; a round measures every setting once, in an
order that changes from round to round, and ratios to the default setting are taken within a round. Accuracy is that of
fusion-nano on test questions. With `--only`, the other part stays in the output as it is.
"""

import argparse
import copy
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from measure import (
    DTYPES,
    add_machine_options,
    generation_seconds,
    paired_ratios,
    parse_on_machine,
    positive,
    read_result,
    seconds,
    summarize,
    surroundings,
    turned,
    write_result,
)
from memory import peak_allocated
from tqdm import tqdm
from transformers import DynamicCache
from workload import SIZES, Size, build_model, make_image_processor, make_photo, make_prompt

from fusion_hf.inference import ChatModel
from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.model.modeling_fusion_base import cache_keyword
from fusion_hf.model.modeling_fusion_decoder import EmbeddedPrompt
from fusion_hf.nano.evaluate import generate_answers
from fusion_hf.nano.training_records import NanoRecord, test_records

SEED = 3
QUERY_LENS = (4, 16, 36, 64, 144)
GRID_SHARES = (
    1,
    3 / 5,
    1 / 3,
    1 / 7,
)  # shares of the tower's patches per side: for 27, the grids are 27, 16 (FUSION-L), 9 and 4
PARTS = ("times", "accuracy")


def grids_of(side: int) -> list[int]:
    """Return the whole grid of P = `side`, and smaller ones."""
    return sorted({max(1, round(share * side)) for share in GRID_SHARES}, reverse=True)


def budgets_of(side: int, query_lens: Sequence[int]) -> dict[str, TokenBudget]:
    """Return every setting by name."""
    return {
        f"{length} latents, {grid} x {grid}": TokenBudget(length, grid)
        for grid in grids_of(side)
        for length in query_lens
    }


class Times:
    """A model, a prompt about a photo for every setting, and the measurements: figure -> setting -> rounds."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device, query_lens: Sequence[int]):
        self.device, self.new_tokens = device, size.new_tokens
        self.model = build_model(size, dtype, device)
        pixel_values = make_image_processor(size)(make_photo(size.photo), return_tensors="pt")["pixel_values"]
        side = self.model.config.num_patches_per_side
        self.budgets = budgets_of(side, sorted({*query_lens, size.query_len}))
        self.default = next(name for name, budget in self.budgets.items() if budget == (size.query_len, side))
        pixel_values = pixel_values.to(device, dtype)
        self.prompts = {name: self.make_prompt(budget, pixel_values) for name, budget in self.budgets.items()}
        self.measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def make_prompt(self, budget: TokenBudget, pixel_values: torch.Tensor) -> dict[str, Any]:
        """Return the inputs of `generate`."""
        config = copy.deepcopy(self.model.config)
        config.query_len, config.image_token_grid = budget
        return make_prompt(config, pixel_values) | budget._asdict()

    def embed(self, name: str) -> EmbeddedPrompt:
        """Run the tower, connector and projectors, with a reduced grid and pooled latent tokens."""
        given = dict(self.prompts[name])
        del given["query_len"], given["image_token_grid"], given["attention_mask"]
        return self.model.model.embed_prompt(**given, budget=self.budgets[name])

    def read(self, prompt: EmbeddedPrompt) -> DynamicCache:
        """Run the language model with its samplers over a whole prompt."""
        cache = DynamicCache(config=self.model.config.text_config)
        given = {"inputs_embeds": prompt.inputs_embeds, "latent_updates": prompt.latent_updates}
        self.model.model.language_model(**given, **cache_keyword(cache), use_cache=True)
        return cache

    def prefill(self, name: str) -> Any:
        return self.model(**self.prompts[name], use_cache=True, logits_to_keep=1)

    def round(self, index: int) -> None:
        for name in turned(list(self.budgets), index):
            first, later = generation_seconds(self.model, self.prompts[name], self.new_tokens)
            self.measured["first_token_seconds"][name].append(first)
            self.measured["per_token_seconds"][name].append(later)
            image, language = self.part_seconds(name)
            self.measured["picture_seconds"][name].append(image)
            self.measured["language_seconds"][name].append(language)

    def part_seconds(self, name: str) -> tuple[float, float]:
        """Return the seconds of the image, and of the language model after it."""
        prompts: list[EmbeddedPrompt] = []
        image = seconds(lambda: prompts.append(self.embed(name)), self.device)
        return image, seconds(partial(self.read, *prompts), self.device)

    def memory(self, name: str) -> dict[str, int]:
        """
        Return the bytes of keys and values of the prompt, and peaks above weights and inputs. They are the same
        in every run.
        """
        prompt = self.embed(name)
        layers = self.read(prompt).layers
        return {
            "cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
            "first_token_allocated_bytes": peak_allocated(partial(self.prefill, name), self.device),
            "language_allocated_bytes": peak_allocated(partial(self.read, prompt), self.device),
        }

    def row(self, name: str) -> dict[str, Any]:
        """Return all figures of one setting, with ratios to the default setting."""
        return {
            **describe(self.budgets[name]),
            "prompt_tokens": self.prompts[name]["input_ids"].shape[1],
            **self.memory(name),
            "seconds": {figure: summarize(values[name]) for figure, values in self.measured.items()},
            "ratios": {
                figure: paired_ratios(values[name], values[self.default]) for figure, values in self.measured.items()
            },
        }


def describe(budget: TokenBudget) -> dict[str, int]:
    return {**budget._asdict(), "image_tokens": budget.num_image_tokens}


def measure_times(options: argparse.Namespace) -> dict[str, Any]:
    with torch.inference_mode():
        times = Times(SIZES[options.size], DTYPES[options.dtype], torch.device(options.device), options.query_lens)
        for name in turned(list(times.budgets), 0):  # warm-up with every shape
            times.prefill(name)
        for index in tqdm(range(options.repeats), desc="times", unit="round"):
            times.round(index)
        rows = [times.row(name) for name in tqdm(times.budgets, desc="memory", unit="setting")]
    names = ("size", "repeats", "dtype", "device", "threads")
    return {
        "settings": {name: getattr(options, name) for name in names},
        **surroundings(options.device),
        "default": describe(times.budgets[times.default]),
        "rows": rows,
        "repeats": times.measured,
    }


def choose_records(easy_vqa: int, drawn: int) -> list[NanoRecord]:
    """Choose test questions: some of easy-vqa's, and one about each of `drawn` images of every other category."""
    records = test_records(SEED, drawn)
    easy = [record for record in records if record.category == "easy-vqa"]
    others = [record for record in records if record.category != "easy-vqa"]
    return random.Random(SEED).sample(easy, min(easy_vqa, len(easy))) + others


def measure_accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """Count exact answers of fusion-nano by category, for every setting."""
    chat_model = ChatModel.load(device=options.device, dtype=options.dtype)
    config, records = chat_model.model.config, choose_records(options.questions, options.drawn)
    asked, rows = Counter(record.category for record in records), []
    for budget in budgets_of(config.num_patches_per_side, options.query_lens).values():
        answers = generate_answers(chat_model.model, chat_model.processor, records, **budget._asdict())
        right = Counter(r.category for r, answer in zip(records, answers, strict=True) if answer == r.turns[0][1])
        rows.append({**describe(budget), "right": {category: right[category] for category in sorted(asked)}})
    names = ("questions", "drawn", "dtype", "device", "threads")
    return {
        "settings": {name: getattr(options, name) for name in names},
        **surroundings(options.device),
        "default": describe(TokenBudget.of(config)),
        "trained_query_lens": config.query_lens,
        "asked": dict(sorted(asked.items())),
        "rows": rows,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="part to measure; default: both")
    parser.add_argument("--size", choices=SIZES, default="short", help="size of the model")
    parser.add_argument(
        "--query-lens",
        type=positive,
        nargs="+",
        default=QUERY_LENS,
        help="numbers of latent tokens; default: %(default)s",
    )
    parser.add_argument("--repeats", type=positive, default=5, help="number of rounds")
    parser.add_argument("--questions", type=positive, default=1000, help="number of easy-vqa questions")
    parser.add_argument("--drawn", type=positive, default=150, help="number of drawn images per category")
    add_machine_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_on_machine(make_parser(), arguments)
    result = read_result(options.output)
    measures = {"times": measure_times, "accuracy": measure_accuracy}
    for part in PARTS:
        if options.only in (None, part):
            result[part] = measures[part](options)
            write_result(result, options.output)
            print(json.dumps(result[part]["rows"], indent=1))
    return result


if __name__ == "__main__":
    main()
