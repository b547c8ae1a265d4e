"""The table of attention maps, which `report.py` writes together with its own."""

import json
from pathlib import Path

from blocks import NOT_MEASURED, PAGES, RESULTS, Block, Result, conditions, replace_block

DOCUMENT = PAGES / "attention_maps.md"
SOURCE = "maps_cpu.json"
FIGURES = Block("maps on shapes", DOCUMENT)
KINDS = {
    "answer": "answer word, language model",
    "latents": "latent tokens, samplers",
    "question": "question, tower",
}


def percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def render(result: Result | None) -> str:
    """Write the table and its conditions."""
    if result is None:
        return f"{NOT_MEASURED}."
    total = result["questions"]
    lines = [
        "| map | layers | maximum on the shape | on another image's shape | mass | mass above 1 |",
        "|---|---|---|---|---|---|",
    ]
    for kind, name in KINDS.items():
        for layers, found in result["kinds"][kind].items():
            counts = [percent(found[count], total) for count in ("on_shape", "on_other")]
            above = percent(found["mass_above_one"], total)
            lines.append(f"| {name} | {layers} | {' | '.join(counts)} | {found['mass']:.2f} | {above} |")
    asked = " and ".join(f"{count} about the {name}" for name, count in sorted(result["attributes"].items()))
    return "\n".join(
        [
            *lines,
            "",
            f"{total} questions of easy-VQA's test split, {asked}; {result['right']} were answered right. Chance: the "
            f"shape is {100 * result['chance']:.1f} % of the image, and the mass would be 1. {conditions(result)}.",
        ]
    )


def load(folder: Path) -> Result | None:
    path = folder / SOURCE
    return json.loads(path.read_text()) if path.is_file() else None


def update(document: str, folder: Path) -> str:
    """Return the document with the table from the result in `folder`."""
    return replace_block(document, FIGURES, render(load(folder)))


def write() -> None:
    """Update the document."""
    DOCUMENT.write_text(update(DOCUMENT.read_text(), RESULTS))
