"""The tables and the plot of the token budget, which `report.py` writes together with its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blocks import (
    BYTES_PER_MIB,
    DOCS,
    NOT_MEASURED,
    PAGES,
    RESULTS,
    Result,
    Table,
    format_spread,
    load_results,
    replace_block,
)
from plot import Panel, Point, draw

DOCUMENT = PAGES / "token_budget.md"
PLOT = DOCS / "assets" / "token_budget.svg"
PLOTTED = "CPU"  # the column of the plot
EASY = "easy-vqa"
X_LABEL = "image tokens"


def measured_with(part: Result) -> str:
    settings, versions = part["settings"], part["versions"]
    return (
        f"{part['machine']['device']}, {settings['threads']} threads, {settings['dtype']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}"
    )


COLUMNS = {PLOTTED: "token_budget_cpu.json", "GPU": "token_budget_cuda.json"}
TIMES = Table("token budget, times", DOCUMENT, COLUMNS, [], measured_with)
ACCURACY = Table("token budget, accuracy", DOCUMENT, {PLOTTED: COLUMNS[PLOTTED]}, [], measured_with)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def mebibytes(count: int) -> str:
    return f"{count / BYTES_PER_MIB:.1f}"


def times_row(row: dict[str, Any]) -> list[str]:
    ratios = [format_spread(row["ratios"][f"{figure}_seconds"]) for figure in ("first_token", "language", "per_token")]
    memory = [row[name] for name in ("cache_bytes", "language_allocated_bytes", "first_token_allocated_bytes")]
    counts = [f"{row['image_token_grid']}² = {row['image_tokens']}", str(row["query_len"]), str(row["prompt_tokens"])]
    return [*counts, *(ratio or NOT_MEASURED for ratio in ratios), *map(mebibytes, memory)]


def is_default(row: dict[str, Any], part: Result) -> bool:
    return all(row[name] == value for name, value in part["default"].items())


def render_times(column: str, result: Result | None) -> str:
    """Write the table of one device, and what the value 1 stands for."""
    if result is None or "times" not in result:
        return f"{column}: {NOT_MEASURED}."
    part = result["times"]
    head = [
        "image tokens",
        "latents",
        "prompt tokens",
        "first token",
        "first token, language model alone",
        "later tokens",
    ]
    lines = markdown(
        [*head, "cache, MiB", "peak, language model, MiB", "peak, MiB"], list(map(times_row, part["rows"]))
    )
    default = next(row for row in part["rows"] if is_default(row, part))
    first, image, language, later = (
        default["seconds"][f"{figure}_seconds"]["median"]
        for figure in ("first_token", "picture", "language", "per_token")
    )
    settings = part["settings"]
    absolute = (
        f"{column}: {measured_with(part)}, size `{settings['size']}`, {settings['repeats']} rounds. With "
        f"{default['image_tokens']} image tokens and {default['query_len']} latents, the first token took "
        f"{first:.3f} s (image {image:.3f} s, language model {language:.3f} s), a later one "
        f"{later:.4f} s: medians."
    )
    return "\n".join([*lines, "", absolute])


def share(row: dict[str, Any], asked: dict[str, int], categories: Sequence[str]) -> float:
    """Return the percentage of exact answers."""
    return 100 * sum(row["right"][name] for name in categories) / sum(asked[name] for name in categories)


def render_accuracy(result: Result | None) -> str:
    """Write a table of the grid settings by the latent token settings."""
    if result is None or "accuracy" not in result:
        return f"{NOT_MEASURED}."
    part = result["accuracy"]
    asked = part["asked"]
    drawn = [name for name in asked if name != EASY]
    lengths = sorted({row["query_len"] for row in part["rows"]})
    grids = sorted({row["image_token_grid"] for row in part["rows"]}, reverse=True)
    cells = {
        (
            row["image_token_grid"],
            row["query_len"],
        ): f"{share(row, asked, [EASY]):.1f} / {share(row, asked, drawn):.1f}"
        for row in part["rows"]
    }
    rows = [[f"{grid}² = {grid**2}", *(cells[grid, length] for length in lengths)] for grid in grids]
    lines = markdown(["image tokens", *(f"{length} latents" for length in lengths)], rows)
    counts = (
        f"{asked[EASY]} questions of easy-VQA / {sum(asked[name] for name in drawn)} about drawn images "
        f"({', '.join(drawn)})"
    )
    return "\n".join([*lines, "", f"Exact answers in percent, {counts}. {measured_with(part)}."])


def update(document: str, folder: Path) -> str:
    """Return the document with both tables from the results in `folder`."""
    results = load_results(TIMES, folder)
    times = "\n\n".join(render_times(column, result) for column, result in results.items())
    document = replace_block(document, TIMES, times)
    return replace_block(document, ACCURACY, render_accuracy(results[PLOTTED]))


def lines_of(part: Result, point: Any) -> dict[str, list[Point]]:
    """Return a line for each number of latent tokens, over the number of image tokens."""
    lengths = sorted({row["query_len"] for row in part["rows"]})
    rows = sorted(part["rows"], key=lambda row: row["image_tokens"])
    return {f"{length} latents": [point(row) for row in rows if row["query_len"] == length] for length in lengths}


def time_panels(part: Result) -> list[Panel]:
    def time(row: dict[str, Any]) -> Point:
        spread = row["ratios"]["first_token_seconds"]
        return Point(row["image_tokens"], *(spread[name] for name in ("median", "min", "max")))

    def memory(row: dict[str, Any]) -> Point:
        return Point(row["image_tokens"], *[row["cache_bytes"] / BYTES_PER_MIB] * 3)

    default = part["default"]
    unit = f"of {default['image_tokens']} image tokens, {default['query_len']} latents"
    return [
        Panel("Time to first token", X_LABEL, unit, lines_of(part, time)),
        Panel("Keys and values of the prompt", X_LABEL, "MiB", lines_of(part, memory)),
    ]


def accuracy_panels(part: Result) -> list[Panel]:
    asked = part["asked"]

    def exact(row: dict[str, Any]) -> Point:
        return Point(row["image_tokens"], *[share(row, asked, [name for name in asked if name != EASY])] * 3)

    return [Panel("fusion-nano, drawn images: exact answers", X_LABEL, "percent", lines_of(part, exact))]


def panels_of(result: Result) -> list[Panel]:
    """Return the panels of a result."""
    makers = {"times": time_panels, "accuracy": accuracy_panels}
    return [panel for part, make in makers.items() if part in result for panel in make(result[part])]


def write() -> None:
    """Update the documents."""
    DOCUMENT.write_text(update(DOCUMENT.read_text(), RESULTS))
    result = load_results(TIMES, RESULTS)[PLOTTED]
    if result is not None:
        draw(PLOT, panels_of(result))
