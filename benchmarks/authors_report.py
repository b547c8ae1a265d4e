"""The tables of `authors.py`'s results, which `report.py` writes together with its own."""

from blocks import BYTES_PER_MIB, PAGES, Cell, Result, Row, Table, format_spread
from measure import paired_ratios, summarize

THEIRS, THEIRS_BFLOAT16, OURS, OURS_BFLOAT16 = "theirs", "theirs_bfloat16", "ours", "ours_bfloat16"


def rounds(result: Result, part: str, figure: str, name: str) -> list[float] | None:
    return result.get(part, {}).get(figure, {}).get(name)


def ratio(part: str, figure: str, name: str = OURS, other: str = THEIRS) -> Cell:
    """Return FUSION's figure divided by that of the authors' code, within rounds."""

    def cell(result: Result) -> str | None:
        values, others = (rounds(result, part, figure, each) for each in (name, other))
        if values is None or others is None:
            return None
        spread = paired_ratios(values, others)
        return format_spread(spread) if len(values) > 1 else f"{spread['median']:.2f}"

    return cell


def mebibytes(part: str, figure: str, name: str) -> Cell:
    def cell(result: Result) -> str | None:
        values = rounds(result, part, figure, name)
        return None if values is None else f"{summarize(values)['median'] / BYTES_PER_MIB:.0f} MiB"

    return cell


def rows_of_both(title: str, part: str, figure: str, aim: str, aim_bfloat16: str) -> list[Row]:
    """Return one figure in both dtypes."""
    return [
        Row(f"{title}, float32 / theirs", aim, ratio(part, figure)),
        Row(f"{title}, bfloat16 / theirs in float32", aim_bfloat16, ratio(part, figure, OURS_BFLOAT16)),
        Row(f"{title}, bfloat16 in both", "", ratio(part, figure, OURS_BFLOAT16, THEIRS_BFLOAT16)),
    ]


ROWS = [
    Row("cold start to one token, small model", "at most 0.6", ratio("start", "start_nano")),
    Row("cold start to one token", "", ratio("start", "start_middle")),
    Row("imports alone, in Python", "", ratio("start", "imports")),
    Row("preprocessing, 4000 x 3000 pixels", "", ratio("preprocessing", "preprocessing 12 MP")),
    Row("preprocessing, 1152 x 864 pixels", "", ratio("preprocessing", "preprocessing 1152 x 864")),
    *rows_of_both("first token", "tokens", "first_token", "at most 0.6", "at most 0.45"),
    *rows_of_both("later tokens", "tokens", "later_token", "at most 0.65", ""),
    *rows_of_both("eight questions, eight images", "eight", "eight_on_eight", "at most 0.6", "at most 0.5"),
    *rows_of_both("ten questions, one image", "ten", "ten_on_one", "at most 0.25", "at most 0.25"),
    *rows_of_both("resident memory after loading", "memory", "resident", "", ""),
    *rows_of_both("growth of resident memory by an answer", "memory", "growth", "", ""),
    Row("resident memory after loading: theirs", "", mebibytes("memory", "resident", THEIRS)),
    Row("resident memory after loading: ours, float32", "", mebibytes("memory", "resident", OURS)),
    Row("training step, checkpointing in both", "at most 0.65", ratio("training", "step")),
    Row("training step, memory above the weights", "at most 0.4", ratio("training", "step_allocated")),
    Row("training step, growth of resident memory", "", ratio("training", "step_resident")),
    Row("training step, memory above the weights: theirs", "", mebibytes("training", "step_allocated", THEIRS)),
    Row("training step, memory above the weights: ours", "", mebibytes("training", "step_allocated", OURS)),
]


def measured_with(result: Result) -> str:
    versions, theirs = result["versions"], result["authors"]["versions"]
    counts = {
        len(values[OURS])
        for part in result.values()
        if isinstance(part, dict)
        for values in part.values()
        if isinstance(values, dict) and OURS in values and len(values[OURS]) > 1
    }
    spans = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(next(iter(counts), 1))
    return (
        f"{result['machine']['device']}, {result['settings']['threads']} threads; ours: torch {versions['torch']}, "
        f"transformers {versions['transformers']}; theirs: torch {theirs['torch']}, transformers "
        f"{theirs['transformers']}; {spans} rounds."
    )


TABLE = Table(
    "authors",
    PAGES / "authors.md",
    {"Intel": "authors_intel.json", "AMD": "authors_amd.json"},
    ROWS,
    measured_with,
)
