"""The tables and plots in documents, and how they are filled from results."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from plot import Panel

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PAGES = DOCS / "benchmarks"
MAX_ROWS = 25  # a longer table is folded
NOT_MEASURED, OUT_OF_MEMORY = "not measured", "out of memory"
BYTES_PER_MIB = 2**20
ALLOCATED = "allocated_bytes"

Result = dict[str, Any]
Cell = Callable[[Result], str | None]


class Row(NamedTuple):
    """A row of a table. `cell` returns None if a result does not hold the figure."""

    name: str
    aim: str
    cell: Cell


@dataclass(frozen=True)
class Block:
    """A part of `document` between two markers with its `name`, which this script writes."""

    name: str
    document: Path

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}: end -->"


@dataclass(frozen=True)
class Table(Block):
    """A table. `columns` maps titles to files, and `conditions` describes in one line how a result was measured."""

    columns: dict[str, str]
    rows: list[Row]
    conditions: Callable[[Result], str]


@dataclass(frozen=True)
class Plot(Block):
    """A plot of one result. `source` is its file, and `panels` is empty if the result does not hold the figures."""

    image: Path
    description: str
    source: str
    panels: Callable[[Result], list[Panel]]


def format_spread(spread: dict[str, float] | None, style: str = ".2f") -> str | None:
    """Write the median, the minimum and the maximum of the rounds."""
    if spread is None:
        return None
    middle, least, most = (format(spread[name], style) for name in ("median", "min", "max"))
    return f"{middle} ({least}-{most})"


def conditions(result: Result) -> str:
    settings, versions = result["settings"], result["versions"]
    return (
        f"{result['machine']['device']}, {settings['threads']} threads, {settings['dtype']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}"
    )


def describe(table: Table, result: Result) -> str:
    """Write all figures of one result as plain text."""
    width = max(len(row.name) for row in table.rows)
    return "\n".join(f"{row.name:{width}}  {row.cell(result) or NOT_MEASURED}" for row in table.rows)


def render(table: Table, results: dict[str, Result | None]) -> str:
    """Write a table in Markdown. The cells of a column without a result say so."""
    lines = [f"| figure | target | {' | '.join(results)} |", "|---" * (len(results) + 2) + "|"]
    for row in table.rows:
        cells = [(row.cell(result) if result is not None else None) or NOT_MEASURED for result in results.values()]
        lines.append(f"| {row.name} | {row.aim} | {' | '.join(cells)} |")
    if len(table.rows) > MAX_ROWS:
        lines = ["<details>", f"<summary>All {len(table.rows)} rows</summary>", "", *lines, "", "</details>"]
    measured = [f"- {column}: {table.conditions(result)}" for column, result in results.items() if result is not None]
    return "\n".join([*lines, "", *measured] if measured else lines)


def load_results(table: Table, folder: Path) -> dict[str, Result | None]:
    """Load one result per column, or None if its file does not exist."""
    paths = {column: folder / name for column, name in table.columns.items()}
    return {column: json.loads(path.read_text()) if path.is_file() else None for column, path in paths.items()}


def replace_block(document: str, block: Block, text: str) -> str:
    """Return the document with `text` between the markers."""
    head, _, rest = document.partition(block.begin)
    _, found, tail = rest.partition(block.end)
    if not found:
        raise ValueError(
            f"{block.document.name} must have the lines {block.begin!r} and {block.end!r}, in this order."
        )
    return f"{head}{block.begin}\n\n{text}\n\n{block.end}{tail}"


def show(plot: Plot) -> str:
    """Write a plot as a Markdown image, with its path relative to the document."""
    return f"![{plot.description}]({Path(os.path.relpath(plot.image, plot.document.parent)).as_posix()})"


def load_panels(plot: Plot, folder: Path) -> list[Panel]:
    """Return the panels of a plot, or None if the result is missing or does not hold the figures."""
    path = folder / plot.source
    return plot.panels(json.loads(path.read_text())) if path.is_file() else []
