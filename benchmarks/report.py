"""Writes the tables of the documents from `benchmarks/results`: run it after a new measurement."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PERFORMANCE = DOCS / "performance.md"
NOT_MEASURED, OUT_OF_MEMORY = "not measured", "out of memory"
BYTES_PER_MIB = 2**20
ALLOCATED = "allocated_bytes"

Result = dict[str, Any]
Cell = Callable[[Result], str | None]


class Row(NamedTuple):
    """A line of a table; `cell` is None where a result does not hold the figure."""

    name: str
    aim: str
    cell: Cell


class Table(NamedTuple):
    """
    A table between two markers with its `name` in `document`. `columns`: title and file. `conditions`: one line on
    what a result was measured with.
    """

    name: str
    document: Path
    columns: dict[str, str]
    rows: list[Row]
    conditions: Callable[[Result], str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}: end -->"


def format_spread(spread: dict[str, float] | None, style: str = ".2f") -> str | None:
    """Median, and smallest to largest of the rounds."""
    if spread is None:
        return None
    middle, least, most = (format(spread[name], style) for name in ("median", "min", "max"))
    return f"{middle} ({least}-{most})"


def ratio(figure: str, other: str) -> Cell:
    """Ours divided by `other`."""
    return lambda result: format_spread(result["ratios"].get(figure, {}).get(other))


def fraction(figure: str, variant: str) -> Cell:
    return lambda result: format_spread(result["machine_fractions"][figure][variant], ".0%")


def mebibytes(figure: str, variant: str) -> Cell:
    return lambda result: f"{result['medians'][figure][variant] / BYTES_PER_MIB:.0f} MiB"


def step_ratio(figure: str, variant: str, other: str) -> Cell:
    """One way of making a training step divided by another."""

    def cell(result: Result) -> str | None:
        return format_spread(result.get("step", {}).get("ratios", {}).get(figure, {}).get(variant, {}).get(other))

    return cell


def memory_ratio(figure: str, variant: str, other: str) -> Cell:
    """The same of what is measured once."""

    def cell(result: Result) -> str | None:
        spread = result.get("step", {}).get("ratios", {}).get(figure, {}).get(variant, {}).get(other)
        return None if spread is None else f"{spread['median']:.2f}"

    return cell


def step_fraction(variant: str) -> Cell:
    return lambda result: format_spread(result.get("step", {}).get("machine_fractions", {}).get(variant), ".0%")


def step_memory(variant: str) -> Cell:
    """What forward and backward add to the weights, or that they did not fit."""

    def cell(result: Result) -> str | None:
        step = result.get("step", {"out_of_memory": [], "medians": {}})
        if variant in step["out_of_memory"]:
            return OUT_OF_MEMORY
        count = step["medians"].get(ALLOCATED, {}).get(variant)
        return None if count is None else f"{count / BYTES_PER_MIB:.0f} MiB"

    return cell


def loader_ratio(workers: int) -> Cell:
    return lambda result: format_spread(result.get("loader", {}).get("ratios", {}).get(str(workers)))


def step_share(name: str) -> Cell:
    """Share of a step in a run of the trainer, or that it did not fit."""

    def cell(result: Result) -> str | None:
        trainer = result.get("trainer", {})
        return (
            OUT_OF_MEMORY if "out_of_memory" in trainer else format_spread(trainer.get("shares", {}).get(name), ".2%")
        )

    return cell


INFERENCE_ROWS = [
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


CHECKPOINTED, WITH_BOTH = "ours, checkpointing", "checkpointing in both"
TRAINING_ROWS = [
    Row("step / reference", "at most 0.6", step_ratio("step_seconds", "ours", "reference")),
    Row(
        f"step / reference; {CHECKPOINTED}",
        "at most 0.6",
        step_ratio("step_seconds", "ours_checkpointed", "reference"),
    ),
    Row(
        f"step / reference; {WITH_BOTH}", "", step_ratio("step_seconds", "ours_checkpointed", "reference_checkpointed")
    ),
    Row("step / eager", "", step_ratio("step_seconds", "ours", "eager")),
    Row("step, with checkpointing / without", "", step_ratio("step_seconds", "ours_checkpointed", "ours")),
    Row("of it, forward and backward / reference", "", step_ratio("passes_seconds", "ours", "reference")),
    Row("forward and backward, of the matrix-product rate: ours", "", step_fraction("ours")),
    Row(f"forward and backward, of the matrix-product rate: {CHECKPOINTED}", "", step_fraction("ours_checkpointed")),
    Row("forward and backward, of the matrix-product rate: eager", "", step_fraction("eager")),
    Row("forward and backward, of the matrix-product rate: reference", "", step_fraction("reference")),
    Row("peak memory above the weights / reference", "at most 0.25", memory_ratio(ALLOCATED, "ours", "reference")),
    Row(
        f"peak memory above the weights / reference; {CHECKPOINTED}",
        "at most 0.25",
        memory_ratio(ALLOCATED, "ours_checkpointed", "reference"),
    ),
    Row(
        f"peak memory above the weights / reference; {WITH_BOTH}",
        "",
        memory_ratio(ALLOCATED, "ours_checkpointed", "reference_checkpointed"),
    ),
    Row("peak memory above the weights / eager", "", memory_ratio(ALLOCATED, "ours", "eager")),
    Row("peak memory above the weights: ours", "", step_memory("ours")),
    Row(f"peak memory above the weights: {CHECKPOINTED}", "", step_memory("ours_checkpointed")),
    Row("peak memory above the weights: eager", "", step_memory("eager")),
    Row("peak memory above the weights: reference", "", step_memory("reference")),
    Row("peak memory above the weights: reference, checkpointing", "", step_memory("reference_checkpointed")),
    Row("growth of resident memory / reference", "", memory_ratio("resident_bytes", "ours", "reference")),
    Row(
        f"growth of resident memory / reference; {CHECKPOINTED}",
        "",
        memory_ratio("resident_bytes", "ours_checkpointed", "reference"),
    ),
    Row("loader, 1 worker / plain decoding and resizing", "at least 0.85", loader_ratio(1)),
    Row("loader, 2 workers / plain decoding and resizing", "at least 0.85", loader_ratio(2)),
    Row("collation in the main process, of a step", "", step_share("collation")),
    Row("collation, logging and all but passes and optimizer, of a step", "under 3 %", step_share("rest")),
]


def inference_conditions(result: Result) -> str:
    return f"{conditions(result)}, {result['settings']['repeats']} rounds, {result['prompt_tokens']} prompt tokens."


def training_conditions(result: Result) -> str:
    products = ", matrix products in bfloat16" if result["settings"]["autocast"] else ""
    return f"{conditions(result)}{products}, {result['settings']['rounds']} rounds."


def conditions(result: Result) -> str:
    settings, versions = result["settings"], result["versions"]
    return (
        f"{result['machine']['device']}, {settings['threads']} threads, {settings['dtype']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}"
    )


INFERENCE = Table(
    "benchmark", PERFORMANCE, {"CPU": "cpu.json", "GPU": "cuda.json"}, INFERENCE_ROWS, inference_conditions
)
TRAINING = Table(
    "training benchmark",
    PERFORMANCE,
    {"CPU": "training_cpu.json", "GPU, 3B": "training_cuda_3b.json", "GPU, 8B": "training_cuda_8b.json"},
    TRAINING_ROWS,
    training_conditions,
)
TABLES = [
    INFERENCE,
    TRAINING,
]


def describe(table: Table, result: Result) -> str:
    """All figures of one result as plain text."""
    width = max(len(row.name) for row in table.rows)
    return "\n".join(f"{row.name:{width}}  {row.cell(result) or NOT_MEASURED}" for row in table.rows)


def render(table: Table, results: dict[str, Result | None]) -> str:
    """The table in Markdown; a column without a result says so in every cell."""
    lines = [f"| figure | aim | {' | '.join(results)} |", "|---" * (len(results) + 2) + "|"]
    for row in table.rows:
        cells = [(row.cell(result) if result is not None else None) or NOT_MEASURED for result in results.values()]
        lines.append(f"| {row.name} | {row.aim} | {' | '.join(cells)} |")
    measured = [f"{column}: {table.conditions(result)}" for column, result in results.items() if result is not None]
    return "\n".join([*lines, "", *measured] if measured else lines)


def load_results(table: Table, folder: Path) -> dict[str, Result | None]:
    """One result per column; None where its file does not exist."""
    paths = {column: folder / name for column, name in table.columns.items()}
    return {column: json.loads(path.read_text()) if path.is_file() else None for column, path in paths.items()}


def replace_table(document: str, table: Table, text: str) -> str:
    """The document with `text` between the table's markers."""
    head, _, rest = document.partition(table.begin)
    _, found, tail = rest.partition(table.end)
    if not found:
        raise ValueError(f"{table.document.name} needs the lines {table.begin!r} and {table.end!r}, in this order.")
    return f"{head}{table.begin}\n\n{text}\n\n{table.end}{tail}"


def documents() -> list[Path]:
    """All that hold a table, each once."""
    return list(dict.fromkeys(table.document for table in TABLES))


def update(document: Path, folder: Path) -> str:
    """The text of the document with all of its tables from the results in `folder`."""
    text = document.read_text()
    for table in TABLES:
        if table.document == document:
            text = replace_table(text, table, render(table, load_results(table, folder)))
    return text


def write_documents() -> None:
    """Bring all tables up to date with the committed results."""
    for document in documents():
        document.write_text(update(document, RESULTS))


if __name__ == "__main__":
    write_documents()
