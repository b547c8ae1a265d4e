"""Estimate the cost and the time of a run from the lengths of prompts and the allowed lengths of answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor

from fusion_hf.synthesis.category import Category, load_categories
from fusion_hf.synthesis.run_config import PROCEDURAL, SynthesisConfig

CHARACTERS_PER_TOKEN = 4  # average for English text and large language models
TOKENS_PER_WORD = 1.35
CAPTION_WORDS = 20
JSON_TOKENS = 16  # tokens of braces and names around a turn
SECONDS_PER_HOUR, MILLION = 3600, 10**6
DEFAULT_WORDS = {"question": 12, "answer": 20, "description": 120}


@dataclass(frozen=True)
class Estimate:
    """
    The estimate of a run.

    Attributes:
        records: the number of records, by category.
        requests: the number of requests to the language model, if every first answer is valid.
        input_tokens: the number of tokens in these requests.
        output_tokens: the number of tokens in their answers.
        images: the number of images, if no record is rejected before.
        cost: the cost in the currency of the prices. None if a price is missing.
        hours: the time in hours. None if a speed is missing.
        missing: the configuration keys that are missing for cost and time.
    """

    records: Mapping[str, int]
    requests: int
    input_tokens: int
    output_tokens: int
    images: int
    cost: float | None
    hours: float | None
    missing: tuple[str, ...]

    def lines(self) -> list[str]:
        """Write the estimate as lines for a terminal."""
        mix = ", ".join(f"{name} {number:,}" for name, number in self.records.items())
        lines = [f"records: {sum(self.records.values()):,} ({mix})"]
        lines.append(
            f"requests: {self.requests:,}, about {self.input_tokens:,} tokens in and {self.output_tokens:,} out; "
            f"images: {self.images:,}"
        )
        cost = "unknown" if self.cost is None else f"about {self.cost:,.2f}"
        hours = "unknown" if self.hours is None else f"about {self.hours:,.2f} hours"
        lines.append(f"cost: {cost}; time: {hours}")
        if self.missing:
            lines.append(f"to estimate the rest, set {', '.join(self.missing)} in the configuration")
        return lines


def make_estimate(config: SynthesisConfig) -> Estimate:
    """
    Estimate a whole run.

    Args:
        config: the configuration of the run.
    """
    records = split_records(config.records, config.shares)
    if config.backend == PROCEDURAL:
        return Estimate(records, 0, 0, 0, 0, 0.0, None, ())
    writer, images, executor = config.writer, config.images, config.executor
    assert writer is not None and images is not None, "checked by SynthesisConfig"
    known = load_categories()
    amounts = [[round(number * each) for each in _per_record(known[name])] for name, number in records.items()]
    tokens_in, tokens_out, drawn = map(sum, zip(*amounts, strict=True))
    prices = {
        "writer.price_per_million_input": writer.price_per_million_input,
        "writer.price_per_million_output": writer.price_per_million_output,
        "images.price_per_picture": images.price_per_picture,
    }
    rates = {
        "writer.tokens_per_second": writer.tokens_per_second,
        "images.seconds_per_picture": images.seconds_per_picture,
    }
    cost = hours = None
    if given := _all_given(prices):
        reading, writing, drawing = given
        cost = (tokens_in * reading + tokens_out * writing) / MILLION + drawn * drawing
    if given := _all_given(rates):
        tokens_per_second, seconds_per_picture = given
        at_a_time = executor.tasks if executor.workers == -1 else min(executor.workers, executor.tasks)
        hours = (tokens_out / tokens_per_second + drawn * seconds_per_picture / at_a_time) / SECONDS_PER_HOUR
    missing = tuple(name for name, value in {**prices, **rates}.items() if value is None)
    return Estimate(records, 2 * sum(records.values()), tokens_in, tokens_out, drawn, cost, hours, missing)


def _all_given(settings: Mapping[str, float | None]) -> list[float]:
    """Return the values, or none of them if one is missing."""
    given = [value for value in settings.values() if value is not None]
    return given if len(given) == len(settings) else []


def split_records(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """
    Divide a number of records by shares. Numbers are rounded down, and the largest remainders get one more.

    Args:
        total: the number of records.
        shares: the share of each category. Their sum is 1.
    """
    counts = {name: floor(total * share) for name, share in shares.items()}
    most_cut = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in most_cut[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _per_record(category: Category) -> tuple[float, float, int]:
    """Return the input tokens, output tokens and images of a record."""
    length = category.rules.get("length", {})  # uses the middle of the allowed range
    words = {name: sum(length[name]) / 2 if name in length else usual for name, usual in DEFAULT_WORDS.items()}
    turns = sum(category.turns) / 2
    described = words["description"] * TOKENS_PER_WORD * category.pictures
    prompts = (len(category.describe_prompt) + len(category.qa_prompt)) / CHARACTERS_PER_TOKEN
    written = turns * ((words["question"] + words["answer"]) * TOKENS_PER_WORD + JSON_TOKENS)
    return prompts + CAPTION_WORDS * TOKENS_PER_WORD + described, described + written, category.pictures
