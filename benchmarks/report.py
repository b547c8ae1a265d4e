"""Write the tables and plots of the documents from `benchmarks/results`. Run this after a new measurement."""

from pathlib import Path
from statistics import median

import authors_report
import budget_report
import gpu_report
import maps_report
import serving_report
import synthesis_report
from blocks import (
    ALLOCATED,
    BYTES_PER_MIB,
    DOCS,
    NOT_MEASURED,
    OUT_OF_MEMORY,
    PAGES,
    RESULTS,
    Cell,
    Plot,
    Result,
    Row,
    Table,
    conditions,
    format_spread,
    load_panels,
    load_results,
    render,
    replace_block,
    show,
)
from cpu_report import ROWS as CPU_ROWS
from cpu_report import cpu_conditions
from plot import Panel, Point, draw
from quantization_report import ROWS as QUANTIZATION_ROWS
from quantization_report import quantization_conditions


def ratio(figure: str, other: str) -> Cell:
    """Return the figure of FUSION divided by that of `other`."""
    return lambda result: format_spread(result["ratios"].get(figure, {}).get(other))


def spread_of(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def fraction(name: str, variant: str) -> Cell:
    return lambda result: format_spread(result["machine_fractions"].get(name, {}).get(variant), ".0%")


def mebibytes(figure: str, variant: str) -> Cell:
    def cell(result: Result) -> str | None:
        count = result["medians"].get(figure, {}).get(variant)
        return None if count is None else f"{count / BYTES_PER_MIB:.0f} MiB"

    return cell


def values_at(result: Result, path: tuple[str, ...]) -> list[float] | None:
    """Return one value of each round, or None if the result does not hold them."""
    for key in path:
        result = result.get(key, {})
    return list(result) or None


def values(*path: str, scale: float = 1, style: str = ".2f", inverse: bool = False) -> Cell:
    """Return the figure of every round multiplied by `scale`, or `scale` divided by the figure."""

    def cell(result: Result) -> str | None:
        rounds = values_at(result, path)
        if rounds is None:
            return None
        return format_spread(spread_of([scale / value if inverse else scale * value for value in rounds]), style)

    return cell


def paired(path: tuple[str, ...], other: tuple[str, ...], scale: float = 1) -> Cell:
    """Return one figure divided by another one of the same round, multiplied by `scale`."""

    def cell(result: Result) -> str | None:
        rounds, others = values_at(result, path), values_at(result, other)
        if rounds is None or others is None:
            return None
        return format_spread(spread_of([scale * x / y for x, y in zip(rounds, others, strict=True)]))

    return cell


def per_tile(other: str) -> Cell:
    """Return the time per tile of FUSION divided by that of `other`."""

    def cell(result: Result) -> str | None:
        tiles = {name: facts["tiles"] for name, facts in result.get("contestants", {}).items()}
        if other not in tiles:
            return None
        seconds = ("repeats", "vision_seconds")
        return paired((*seconds, "ours"), (*seconds, other), tiles[other] / tiles["ours"])(result)

    return cell


def picture_tokens(name: str) -> Cell:
    """Of one image, in the language model."""

    def cell(result: Result) -> str | None:
        facts = result.get("contestants", {}).get(name)
        return None if facts is None else f"{facts['picture_tokens']} of {facts['prompt_tokens']}"

    return cell


def step_ratio(figure: str, variant: str, other: str) -> Cell:
    """Return the time of one kind of training step divided by that of another."""

    def cell(result: Result) -> str | None:
        return format_spread(result.get("step", {}).get("ratios", {}).get(figure, {}).get(variant, {}).get(other))

    return cell


def memory_ratio(figure: str, variant: str, other: str) -> Cell:
    """Return the same ratio for figures that are measured only once."""

    def cell(result: Result) -> str | None:
        spread = result.get("step", {}).get("ratios", {}).get(figure, {}).get(variant, {}).get(other)
        return None if spread is None else f"{spread['median']:.2f}"

    return cell


def step_fraction(variant: str) -> Cell:
    return lambda result: format_spread(result.get("step", {}).get("machine_fractions", {}).get(variant), ".0%")


def step_memory(variant: str) -> Cell:
    """Return what forward and backward add to the weights, or that they did not fit."""

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
    """Return a share of a step in a run of the trainer, or that it did not fit."""

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
    Row("time to encode the image / reference", "", ratio("vision_seconds", "reference")),
    Row("time to encode the image / eager", "", ratio("vision_seconds", "eager")),
    Row("decoding, per token / reference", "", ratio("per_token_seconds", "reference")),
    Row("decoding, per token / eager", "", ratio("per_token_seconds", "eager")),
    Row("samplers alone, eight turns / reference", "", ratio("samplers_seconds", "reference")),
    Row("prefill, of the matrix-product rate: ours", "", fraction("prefill_of_matrix_rate", "ours")),
    Row("prefill, of the matrix-product rate: eager", "", fraction("prefill_of_matrix_rate", "eager")),
    Row("prefill, of the matrix-product rate: reference", "", fraction("prefill_of_matrix_rate", "reference")),
    Row("decoding, of the copying bandwidth: ours", "", fraction("decoding_of_copy_rate", "ours")),
    Row("peak activation memory / reference", "at most 0.4", ratio("first_token_allocated_bytes", "reference")),
    Row("peak activation memory / eager", "", ratio("first_token_allocated_bytes", "eager")),
    Row("peak activation memory of the image / reference", "", ratio("vision_allocated_bytes", "reference")),
    Row("peak activation memory: ours", "", mebibytes("first_token_allocated_bytes", "ours")),
    Row("peak activation memory: eager", "", mebibytes("first_token_allocated_bytes", "eager")),
    Row("peak activation memory: reference", "", mebibytes("first_token_allocated_bytes", "reference")),
    Row("growth of resident memory / reference", "", ratio("first_token_resident_bytes", "reference")),
]


CHECKPOINTED, WITH_BOTH = "ours, checkpointing", "checkpointing in both"
TRAINING_ROWS = [
    Row("training step / reference", "at most 0.6", step_ratio("step_seconds", "ours", "reference")),
    Row(
        f"training step / reference; {CHECKPOINTED}",
        "at most 0.6",
        step_ratio("step_seconds", "ours_checkpointed", "reference"),
    ),
    Row(
        f"training step / reference; {WITH_BOTH}",
        "",
        step_ratio("step_seconds", "ours_checkpointed", "reference_checkpointed"),
    ),
    Row("training step / eager", "", step_ratio("step_seconds", "ours", "eager")),
    Row("training step, with checkpointing / without", "", step_ratio("step_seconds", "ours_checkpointed", "ours")),
    Row("forward and backward / reference", "", step_ratio("passes_seconds", "ours", "reference")),
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


LABELS = {
    "llava_onevision": "LLaVA-OneVision, one tile",
    "llava_onevision_tiled": "LLaVA-OneVision, five tiles",
    "smolvlm": "SmolVLM, five tiles",
}
LLAVA = "LLaVA-OneVision"
PREFILL_AIM, DECODING_AIM = "at least 75 % (CPU), 45 % (GPU)", "at least 70 % (CPU), 60 % (GPU)"
FIRST_TOKEN, PER_TOKEN = ("repeats", "first_token_seconds"), ("repeats", "per_token_seconds")
TOKENS_PER_SECOND, GROWTH = "tokens_per_second", "growth_seconds"
LENGTHS, TURNS, QUESTIONS = (GROWTH, "question_tokens"), (GROWTH, "turns"), (GROWTH, "questions")
SHARED = "ours, tiles shared"
COMPARISON_ROWS = [
    Row("image tokens of the prompt: ours", "", picture_tokens("ours")),
    *(Row(f"image tokens of the prompt: {label}", "", picture_tokens(name)) for name, label in LABELS.items()),
    Row("time to first token, seconds: ours", "", values(*FIRST_TOKEN, "ours", style=".3f")),
    *(Row(f"time to first token / {label}", "", ratio("first_token_seconds", name)) for name, label in LABELS.items()),
    Row(
        "time to first token, prompt compiled / not compiled",
        "",
        paired((*FIRST_TOKEN, "ours_prompt_compiled"), (*FIRST_TOKEN, "ours")),
    ),
    Row("time to encode the image / LLaVA-OneVision, one tile", "", ratio("vision_seconds", "llava_onevision")),
    *(Row(f"time to encode a tile / {label}", "", per_tile(name)) for name, label in LABELS.items()),
    Row("prefill, of the matrix-product rate: ours", PREFILL_AIM, fraction("prefill_of_matrix_rate", "ours")),
    Row(
        "prefill, of the matrix-product rate: ours, prompt compiled",
        PREFILL_AIM,
        fraction("prefill_of_matrix_rate", "ours_prompt_compiled"),
    ),
    *(
        Row(f"prefill, of the matrix-product rate: {label}", "", fraction("prefill_of_matrix_rate", name))
        for name, label in LABELS.items()
    ),
    Row("decoding, tokens/s: ours", "", values(*PER_TOKEN, "ours", style=".1f", inverse=True)),
    Row("decoding, tokens/s: ours, compiled", "", values(*PER_TOKEN, "ours_compiled", style=".1f", inverse=True)),
    *(
        Row(f"decoding, per token / {label}", "1.0" if name == "llava_onevision" else "", ratio(PER_TOKEN[1], name))
        for name, label in LABELS.items()
    ),
    Row(
        f"decoding, per token / {LLAVA}, one tile; both compiled",
        "1.0",
        paired((*PER_TOKEN, "ours_compiled"), (*PER_TOKEN, "llava_onevision_compiled")),
    ),
    Row(
        "decoding, per token, compiled: own loop / transformers' loop",
        "",
        paired((*PER_TOKEN, "ours_ahead"), (*PER_TOKEN, "ours_compiled")),
    ),
    Row(
        "decoding, per token, compiled / not compiled", "", paired((*PER_TOKEN, "ours_compiled"), (*PER_TOKEN, "ours"))
    ),
    *(
        Row(f"decoding, of the {rate}ing bandwidth: {label}", aim, fraction(f"decoding_of_{rate}_rate", name))
        for rate, name, label, aim in (
            ("read", "ours", "ours", ""),
            ("read", "ours_compiled", "ours, compiled", DECODING_AIM),
            ("read", "ours_ahead", "ours, compiled, own loop", DECODING_AIM),
            ("read", "llava_onevision", f"{LLAVA}, one tile", ""),
            ("read", "llava_onevision_compiled", f"{LLAVA}, one tile, compiled", ""),
            ("copy", "ours_compiled", "ours, compiled", ""),
        )
    ),
    *(
        row
        for batch in ("1", "4", "16", "32")
        for row in (
            Row(f"batch {batch}, tokens/s: ours", "", values(TOKENS_PER_SECOND, "ours", batch, style=".1f")),
            Row(
                f"batch {batch}, tokens/s / {LLAVA}, one tile",
                "",
                paired((TOKENS_PER_SECOND, "ours", batch), (TOKENS_PER_SECOND, "llava_onevision", batch)),
            ),
        )
    ),
    Row("peak activation memory: ours", "", mebibytes("first_token_allocated_bytes", "ours")),
    *(
        Row(f"peak activation memory: {label}", "", mebibytes("first_token_allocated_bytes", name))
        for name, label in LABELS.items()
    ),
    *(
        Row(f"time to first token, {what} / {than}: {label}", "", paired((*path, name, most), (*path, name, least)))
        for what, than, path, most, least in (
            ("question of 1600 tokens", "20", LENGTHS, "1600", "20"),
            ("eight turns", "one", TURNS, "8", "1"),
        )
        for name, label in (("ours", "ours"), ("llava_onevision", f"{LLAVA}, one tile"))
    ),
    Row(
        "ten questions about an image, tiles shared / separate calls",
        "",
        paired((*QUESTIONS, SHARED, "10"), (*QUESTIONS, "ours", "10")),
    ),
    Row(
        f"ten questions about an image, tiles shared / {LLAVA}, one tile",
        "",
        paired((*QUESTIONS, SHARED, "10"), (*QUESTIONS, "llava_onevision", "10")),
    ),
]


def comparison_conditions(result: Result) -> str:
    rounds = result["settings"]
    return f"{conditions(result)}, {rounds['repeats']} rounds, {rounds.get('slow_repeats')} of growth and throughput."


def growth_panels(result: Result) -> list[Panel]:
    """Return panels of the time to the first token over what it grows with."""
    growth = result.get(GROWTH, {})
    names = {"ours": "ours", SHARED: SHARED, "llava_onevision": f"{LLAVA}, one tile"}
    return [
        Panel(
            title,
            label,
            "seconds",
            {names[name]: points_of(rounds) for name, rounds in growth[what].items()},
        )
        for what, title, label in (
            ("question_tokens", "time to first token", "tokens of the question"),
            ("turns", "time to first token", "turns of the conversation"),
            ("questions", "first tokens of all answers", "questions about one image"),
        )
        if what in growth
    ]


def throughput_panels(result: Result) -> list[Panel]:
    """Return panels of tokens per second over the rows of a batch."""
    names = {"ours": "ours", "llava_onevision": f"{LLAVA}, one tile"}
    lines = {names[name]: points_of(rounds) for name, rounds in result.get(TOKENS_PER_SECOND, {}).items()}
    return [Panel("throughput", "rows of a batch", "new tokens per second", lines)] if lines else []


def points_of(rounds: dict[str, list[float]]) -> list[Point]:
    """Return the points of a line: x value -> spread."""
    spreads = {float(x): spread_of(values) for x, values in rounds.items()}
    return [Point(x, spread["median"], spread["min"], spread["max"]) for x, spread in spreads.items()]


def inference_conditions(result: Result) -> str:
    return f"{conditions(result)}, {result['settings']['repeats']} rounds, {result['prompt_tokens']} prompt tokens."


def training_conditions(result: Result) -> str:
    products = ", matrix products in bfloat16" if result["settings"]["autocast"] else ""
    return f"{conditions(result)}{products}, {result['settings']['rounds']} rounds."


INFERENCE = Table(
    "benchmark", PAGES / "inference.md", {"CPU": "cpu.json", "GPU": "cuda.json"}, INFERENCE_ROWS, inference_conditions
)
TRAINING = Table(
    "training benchmark",
    PAGES / "training.md",
    {"CPU": "training_cpu.json", "GPU, 3B": "training_cuda_3b.json", "GPU, 8B": "training_cuda_8b.json"},
    TRAINING_ROWS,
    training_conditions,
)
COMPARISON = Table(
    "comparison",
    PAGES / "models.md",
    {"CPU": "cpu.json", "GPU, 3B": "cuda_3b.json", "GPU, 8B": "cuda_8b.json"},
    COMPARISON_ROWS,
    comparison_conditions,
)
QUANTIZATION = Table(
    "quantization",
    PAGES / "quantization.md",
    {"CPU": "quantization_cpu.json", "GPU": "quantization_cuda.json"},
    QUANTIZATION_ROWS,
    quantization_conditions,
)
ONE_CPU = Table("types on a CPU", PAGES / "cpu.md", {"Intel, without AMX": "types_cpu.json"}, CPU_ROWS, cpu_conditions)
TABLES = [
    INFERENCE,
    TRAINING,
    COMPARISON,
    QUANTIZATION,
    ONE_CPU,
    authors_report.TABLE,
]
PLOTS = [
    Plot(
        f"growth on a {device}",
        PAGES / "models.md",
        DOCS / "assets" / f"inference_growth_{device.lower()}.svg",
        f"Growth of the time to the first token, and throughput, on a {device}",
        source,
        lambda result: [*growth_panels(result), *throughput_panels(result)],
    )
    for device, source in (("CPU", "cpu.json"), ("GPU", "cuda_3b.json"))
]


def documents() -> list[Path]:
    """List all documents with a table or a plot once."""
    return list(dict.fromkeys(block.document for block in [*TABLES, *PLOTS]))


def update(document: Path, folder: Path) -> str:
    """Return the text of the document with all of its tables and plots from the results in `folder`."""
    text = document.read_text()
    for table in TABLES:
        if table.document == document:
            text = replace_block(text, table, render(table, load_results(table, folder)))
    for plot in PLOTS:
        if plot.document == document:
            text = replace_block(
                text, plot, show(plot) if load_panels(plot, folder) else f"{plot.name}: {NOT_MEASURED}."
            )
    return text


def write_documents() -> None:
    """Update all tables and plots from the committed results."""
    for document in documents():
        document.write_text(update(document, RESULTS))
    for plot in PLOTS:
        panels = load_panels(plot, RESULTS)
        if panels:
            draw(plot.image, panels)
    budget_report.write()
    synthesis_report.write()
    maps_report.write()
    gpu_report.write()
    serving_report.write()


if __name__ == "__main__":
    write_documents()
