"""Writes the tables of `docs/performance.md` from `benchmarks/results`: run it after a new measurement."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
COLUMNS = {"CPU": "cpu.json", "GPU": "cuda.json"}
NOT_MEASURED = "not measured"
BYTES_PER_MIB = 2**20

Result = dict[str, Any]


class Row(NamedTuple):
    """A line of the table; `cell` is None where a result does not hold the figure."""

    name: str
    aim: str
    cell: Callable[[Result], str | None]


def ratio(figure: str, other: str) -> Callable[[Result], str | None]:
    """Ours divided by `other`: median, and smallest to largest of the rounds."""

    def cell(result: Result) -> str | None:
        spread = result["ratios"].get(figure, {}).get(other)
        return None if spread is None else f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})"

    return cell


def fraction(figure: str, variant: str) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        spread = result["machine_fractions"][figure][variant]
        return f"{spread['median']:.0%} ({spread['min']:.0%}-{spread['max']:.0%})"

    return cell


def mebibytes(figure: str, variant: str) -> Callable[[Result], str]:
    return lambda result: f"{result['medians'][figure][variant] / BYTES_PER_MIB:.0f} MiB"


ROWS = [
    Row("preprocessing / the two PIL resizes", "below 1.2", ratio("preprocessing_seconds", "pil_resizes")),
    Row("time to first token / reference", "at most 0.5", ratio("first_token_seconds", "reference")),
    Row("time to first token / eager", "", ratio("first_token_seconds", "eager")),
    Row("of it, picture / reference", "", ratio("vision_seconds", "reference")),
    Row("of it, picture / eager", "", ratio("vision_seconds", "eager")),
    Row("decoding, per token / reference", "", ratio("per_token_seconds", "reference")),
    Row("decoding, per token / eager", "", ratio("per_token_seconds", "eager")),
    Row("samplers alone, eight turns / reference", "", ratio("samplers_seconds", "reference")),
    Row("prefill, of the matrix-product rate: ours", "", fraction("first_token_seconds", "ours")),
    Row("prefill, of the matrix-product rate: eager", "", fraction("first_token_seconds", "eager")),
    Row("prefill, of the matrix-product rate: reference", "", fraction("first_token_seconds", "reference")),
    Row("decoding, of the copying bandwidth: ours", "", fraction("per_token_seconds", "ours")),
    Row("peak activation memory / reference", "at most 0.4", ratio("first_token_allocated_bytes", "reference")),
    Row("peak activation memory / eager", "", ratio("first_token_allocated_bytes", "eager")),
    Row("of it, picture / reference", "", ratio("vision_allocated_bytes", "reference")),
    Row("peak activation memory: ours", "", mebibytes("first_token_allocated_bytes", "ours")),
    Row("peak activation memory: eager", "", mebibytes("first_token_allocated_bytes", "eager")),
    Row("peak activation memory: reference", "", mebibytes("first_token_allocated_bytes", "reference")),
    Row("growth of resident memory / reference", "", ratio("first_token_resident_bytes", "reference")),
]


def describe(result: Result) -> str:
    """All figures of one result as plain text."""
    width = max(len(row.name) for row in ROWS)
    return "\n".join(f"{row.name:{width}}  {row.cell(result) or NOT_MEASURED}" for row in ROWS)


def conditions(column: str, result: Result) -> str:
    """One line on what a column was measured with."""
    settings, versions = result["settings"], result["versions"]
    return (
        f"{column}: {result['machine']['device']}, {settings['threads']} threads, {settings['dtype']}, "
        f"{settings['repeats']} rounds, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{result['prompt_tokens']} prompt tokens."
    )


def render(results: dict[str, Result | None]) -> str:
    """The table in Markdown; a column without a result says so in every cell."""
    lines = [f"| figure | aim | {' | '.join(results)} |", "|---" * (len(results) + 2) + "|"]
    for row in ROWS:
        cells = [(row.cell(result) if result is not None else None) or NOT_MEASURED for result in results.values()]
        lines.append(f"| {row.name} | {row.aim} | {' | '.join(cells)} |")
    measured = [conditions(column, result) for column, result in results.items() if result is not None]
    return "\n".join([*lines, "", *measured])


def load_results(folder: Path) -> dict[str, Result | None]:
    """One result per column; None where its file does not exist."""
    paths = {column: folder / name for column, name in COLUMNS.items()}
    return {column: json.loads(path.read_text()) if path.is_file() else None for column, path in paths.items()}


def replace_table(document: str, table: str) -> str:
    """The document with `table` between the markers."""
    head, _, rest = document.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError(f"The document needs the lines {BEGIN!r} and {END!r}, in this order.")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(replace_table(DOCUMENT.read_text(), render(load_results(RESULTS))))
