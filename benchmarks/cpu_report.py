"""The rows of the table of dtypes and products on one CPU."""

from blocks import NOT_MEASURED, Cell, Result, Row, format_spread

# copied from `cpu.py`, which takes seconds to import
BASE = "float32"
CHOSEN, ALL = "oneDNN where it is faster", "oneDNN for all products"

HALF = "bfloat16"
FIGURES = (
    ("times", "first_token_seconds", "time to first token"),
    ("times", "four_tiles_seconds", "encoding four tiles"),
    ("times", "per_token_seconds", "later tokens"),
    ("eight", "eight_questions_seconds", "eight questions on eight images"),
)
VARIANTS = (f"{BASE}, {CHOSEN}", f"{BASE}, {ALL}", HALF, f"{HALF}, {CHOSEN}")


def ratio(part: str, figure: str, variant: str) -> Cell:
    """Return the figure of a variant divided by that of float32 with torch's own products."""
    return lambda result: format_spread(result.get(part, {}).get("ratios", {}).get(figure, {}).get(variant))


def error(figure: str, variant: str) -> Cell:
    """Return the relative error compared with float32 with torch's own products."""

    def cell(result: Result) -> str | None:
        found = result.get("times", {}).get("errors", {}).get(figure, {}).get(variant)
        return None if found is None else f"{found:.0e}"

    return cell


def accuracy(dtype: str) -> Cell:
    """Return the exact answers of fusion-nano by category."""

    def cell(result: Result) -> str | None:
        part = result.get("accuracy")
        if part is None:
            return None
        asked, right = part["asked"], part["right"][dtype]
        return ", ".join(
            f"{name.replace('vqa', 'VQA')} {right.get(name, 0) / count:.1%} of {count}"
            for name, count in asked.items()
        )

    return cell


ROWS = [
    *(
        Row(f"{title}: {variant}", "", ratio(part, figure, variant))
        for part, figure, title in FIGURES
        for variant in VARIANTS
        if not (part == "eight" and variant.endswith(ALL))
    ),
    *(
        Row(f"error of the {figure}: {variant}", "", error(figure, variant))
        for figure in ("features", "logits")
        for variant in VARIANTS
    ),
    *(Row(f"fusion-nano, right answers: {dtype}", "", accuracy(dtype)) for dtype in (BASE, HALF)),
]


def cpu_conditions(result: Result) -> str:
    times = result.get("times")
    if times is None:
        return f"times {NOT_MEASURED}."
    settings, versions = times["settings"], times["versions"]
    eight = result.get("eight", {"settings": {"eight_repeats": 0}})["settings"]["eight_repeats"]
    chosen = HALF if times["is_bfloat16_faster"] else BASE
    return (
        f"{times['machine']['device']}, {settings['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, size `{settings['size']}`, {settings['repeats']} rounds, {eight} of eight "
        f"questions. `auto` takes {chosen} here."
    )
