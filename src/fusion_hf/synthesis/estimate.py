"""What a run will cost and how long it will take, before it begins. From lengths of prompts and of allowed answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Any

from fusion_hf.synthesis.category import Category, load_categories
from fusion_hf.synthesis.run_config import EndpointSettings, SynthesisConfig

CHARACTERS_PER_TOKEN = 4  # of English in the vocabularies of large models
TOKENS_PER_WORD = 1.35
CAPTION_WORDS = 20
JSON_TOKENS = 16  # of braces and names around a turn
SECONDS_PER_HOUR, MILLION = 3600, 10**6
DEFAULT_WORDS = {"question": 12, "answer": 20, "description": 120}


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        requests, input_tokens, output_tokens: of the language model, if each first answer is valid.
        images: if nothing is rejected before them.
        cost, hours: None where the config does not say what is needed for it.
        missing: keys of the config that would say it.
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
        """Write the estimate for a terminal."""
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
            lines.append(f"for what is unknown, give {', '.join(self.missing)} in the config")
        return lines


def make_estimate(config: SynthesisConfig) -> Estimate:
    """Estimate the whole run, from its beginning."""
    records = split_records(config.records, config.shares)
    if config.backend == "procedural":
        return Estimate(records, 0, 0, 0, 0, 0.0, None, ())
    known = load_categories()
    totals = [0, 0, 0]
    for name, number in records.items():
        for place, amount in enumerate(_per_record(known[name])):
            totals[place] += round(number * amount)
    input_tokens, output_tokens, images = totals
    cost, cost_missing = _cost(config, input_tokens, output_tokens, images)
    hours, time_missing = _hours(config, output_tokens, images)
    requests = 2 * sum(records.values())
    return Estimate(
        records, requests, input_tokens, output_tokens, images, cost, hours, (*cost_missing, *time_missing)
    )


def split_records(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide `total` by shares: rounded down, and one more where that has cut off most."""
    counts = {name: floor(total * share) for name, share in shares.items()}
    most_cut = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in most_cut[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _per_record(category: Category) -> tuple[float, float, int]:
    """Tokens in, tokens out, images."""
    words = {name: _words(category, name) for name in DEFAULT_WORDS}
    turns = (category.turns.least + category.turns.most) / 2
    described = words["description"] * TOKENS_PER_WORD * category.pictures
    prompts = (len(category.describe_prompt) + len(category.qa_prompt)) / CHARACTERS_PER_TOKEN
    written = turns * ((words["question"] + words["answer"]) * TOKENS_PER_WORD + JSON_TOKENS)
    return prompts + CAPTION_WORDS * TOKENS_PER_WORD + described, described + written, category.pictures


def _words(category: Category, name: str) -> float:
    """The middle of what the category's rule on length allows."""
    settings: Mapping[str, Any] = category.rules.get("length", {})
    return sum(settings[name]) / 2 if name in settings else DEFAULT_WORDS[name]


def _cost(
    config: SynthesisConfig, input_tokens: int, output_tokens: int, drawn: int
) -> tuple[float | None, tuple[str, ...]]:
    writer, images = config.writer, config.images
    assert isinstance(writer, EndpointSettings) and images is not None, "checked by SynthesisConfig"
    prices = {
        "writer.price_per_million_input": writer.price_per_million_input,
        "writer.price_per_million_output": writer.price_per_million_output,
        "images.price_per_picture": images.price_per_picture,
    }
    if missing := tuple(name for name, price in prices.items() if price is None):
        return None, missing
    reading, writing, image = (price or 0.0 for price in prices.values())
    return (input_tokens * reading + output_tokens * writing) / MILLION + drawn * image, ()


def _hours(config: SynthesisConfig, output_tokens: int, drawn: int) -> tuple[float | None, tuple[str, ...]]:
    writer, images, executor = config.writer, config.images, config.executor
    assert isinstance(writer, EndpointSettings) and images is not None, "checked by SynthesisConfig"
    rates = {
        "writer.tokens_per_second": writer.tokens_per_second,
        "images.seconds_per_picture": images.seconds_per_picture,
    }
    if missing := tuple(name for name, rate in rates.items() if rate is None):
        return None, missing
    tokens_per_second, seconds_per_picture = (rate or 0.0 for rate in rates.values())
    at_a_time = executor.tasks if executor.workers == -1 else min(executor.workers, executor.tasks)
    seconds = output_tokens / tokens_per_second + drawn * seconds_per_picture / at_a_time
    return seconds / SECONDS_PER_HOUR, ()
