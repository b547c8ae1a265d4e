"""The rows of the table of quantization."""

from blocks import BYTES_PER_MIB, NOT_MEASURED, Cell, Result, Row, conditions, format_spread

BASE = "none"
BNB_8, BNB_4 = "bitsandbytes, 8 bits", "bitsandbytes, 4 bits (nf4)"
INT8, INT4 = "torchao, int8", "torchao, int4"
NAMES = (BNB_8, BNB_4, INT8, INT4)
AIMS = {BNB_8: "at most 1 point lost", INT8: "at most 1 point lost"}


def weights(method: str, part: str) -> Cell:
    """Return the bytes of the weights, and their share of those without quantization."""

    def cell(result: Result) -> str | None:
        counts = result.get("times", {}).get("bytes")
        if counts is None:
            return None
        count = counts[method][part]
        return f"{count / BYTES_PER_MIB:.0f} MiB ({count / counts[BASE][part]:.0%})"

    return cell


def ratio(figure: str, method: str) -> Cell:
    return lambda result: format_spread(result.get("times", {}).get("ratios", {}).get(figure, {}).get(method))


def accuracy(method: str) -> Cell:
    """Return the number of exact answers and the number of questions."""

    def cell(result: Result) -> str | None:
        part = result.get("accuracy")
        return None if part is None else f"{part['right'][method] / part['questions']:.2%} of {part['questions']}"

    return cell


ROWS = [
    *(
        Row(f"{title}: {name}", "", weights(name, part))
        for part, title in (("layers", "layers of the language model"), ("model", "all weights"))
        for name in (BASE, *NAMES)
    ),
    *(
        Row(f"{title} / not quantized: {name}", "", ratio(figure, name))
        for figure, title in (
            ("per_token_seconds", "decoding, per token"),
            ("first_token_seconds", "time to first token"),
        )
        for name in NAMES
    ),
    *(Row(f"fusion-nano, right answers: {name}", AIMS.get(name, ""), accuracy(name)) for name in (BASE, *NAMES)),
]


def quantization_conditions(result: Result) -> str:
    """Describe the conditions of the times. Accuracy depends only on the versions."""
    times = result.get("times")
    if times is None:
        return f"times {NOT_MEASURED}."
    libraries = ", ".join(f"{name} {times['versions'][name]}" for name in ("bitsandbytes", "torchao"))
    return f"{conditions(times)}, {libraries}, {times['settings']['repeats']} rounds."
