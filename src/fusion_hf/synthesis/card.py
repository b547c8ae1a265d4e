"""The data card of a run, and its contact sheet as a picture and as a page."""

import html
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image, ImageDraw, ImageOps

from fusion_hf.outputs import write_atomically
from fusion_hf.synthesis.shards import read_records
from fusion_hf.synthesis.summary import Summary

CARD, SHEET, PAGE = "README.md", "contact_sheet.png", "contact_sheet.html"
SIDE, GAP, LABEL = 192, 8, 20  # pixels: of a picture's box, between boxes, of a line of text
COLUMNS = 4
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"  # of the page: nothing runs
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


class Sample(NamedTuple):
    """A written record that is shown."""

    category: str
    record: dict[str, Any]
    picture: Image.Image


def write_card(data: Path, report: dict[str, Any], summary: Summary, mixtures: list[Path], kind: str) -> None:
    """Write the card and, if there is a record to show, the contact sheet."""
    samples = list(_samples(data, summary, kind))
    if samples:
        write_atomically(data / SHEET, _sheet(samples))
        write_atomically(data / PAGE, _page(samples).encode("utf-8", "backslashreplace"))
    write_atomically(data / CARD, _card(report, mixtures, bool(samples)).encode("utf-8", "backslashreplace"))


def _samples(data: Path, summary: Summary, kind: str) -> Iterator[Sample]:
    """In the order of categories; shards are read until all are found."""
    wanted = {identity for category in summary.categories.values() for identity in category.samples}
    found: dict[str, Sample] = {}
    for shard in sorted(data.glob(f"stage*/*.{kind}")):
        if len(found) == len(wanted):
            break
        for record, picture in read_records(shard):
            if record["id"] in wanted:
                found[record["id"]] = Sample(record["category"], record, _thumbnail(picture))
            if len(found) == len(wanted):
                break
    for _, category in sorted(summary.categories.items()):
        yield from (found[identity] for identity in category.samples if identity in found)


def _thumbnail(content: bytes) -> Image.Image:
    with Image.open(BytesIO(content), formats=("PNG",)) as picture:
        return ImageOps.contain(picture.convert("RGB"), (SIDE, SIDE))


def _sheet(samples: list[Sample]) -> bytes:
    rows: list[list[Sample]] = []
    for sample in samples:
        if not rows or rows[-1][0].category != sample.category or len(rows[-1]) == COLUMNS:
            rows.append([])
        rows[-1].append(sample)
    height = SIDE + LABEL + GAP
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, len(rows) * height + GAP), WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = GAP + number * height
        draw.text((GAP, top), row[0].category, fill=BLACK)
        for column, sample in enumerate(row):
            sheet.paste(sample.picture, (GAP + column * (SIDE + GAP), top + LABEL))
    return _png(sheet)


def _png(picture: Image.Image) -> bytes:
    stream = BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _page(samples: list[Sample]) -> str:
    """Everything in it is text of models and strangers: escaped, and the page runs nothing."""
    parts = [
        '<!doctype html><meta charset="utf-8"><title>Contact sheet</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        "<style>body{font-family:sans-serif;max-width:60em;margin:auto}dt{font-weight:bold}</style>",
        f'<p><img src="{SHEET}" alt="Sample pictures by category">',
    ]
    for sample in samples:
        parts.append(f"<h2>{html.escape(sample.category)}: {html.escape(sample.record['id'])}</h2><dl>")
        for turn in sample.record["conversations"]:
            tag = "dt" if turn["from"] == "human" else "dd"
            parts.append(f"<{tag}>{html.escape(turn['value'])}</{tag}>")
        parts.append("</dl>")
    return "\n".join(parts) + "\n"


def _card(report: dict[str, Any], mixtures: list[Path], has_sheet: bool) -> str:
    header = {"task_categories": ["visual-question-answering"], "language": ["en"], "tags": ["synthetic"]}
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", "", "# Synthesized visual questions", ""]
    lines += [
        f"{report['written']:,} of {report['records']:,} records that were begun; the others were rejected, each with "
        f"its reason in `rejected/`. Backend: {report['backend']}. Seed: {report['seed']}.",
        "",
        "Made by `fusion-hf synthesize` of fusion_hf. For training, name a mixture in `data`: "
        + (", ".join(f"`{path.name}`" for path in mixtures) or "there is none"),
        "",
    ]
    if has_sheet:
        lines += [f"![Sample pictures by category]({SHEET})", "", f"Their questions are in `{PAGE}`.", ""]
    lines += ["## Composition", "", "| category | stage | begun | written | turns | words of answers |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, counts in report["categories"].items():
        numbers = " | ".join(f"{counts[key]:,}" for key in ("records", "written", "turns", "words"))
        lines.append(f"| {name} | {counts['stage']} | {numbers} |")
    lines += ["", "## Models", "", "| step | model | records |", "|---|---|---|"]
    for step, models in report["models"].items():
        lines += [f"| {step} | {_cell(model)} | {number:,} |" for model, number in models.items()]
    lines += ["", "## Yield of each step", "", "| category | step | came | rejected | kept |", "|---|---|---|---|---|"]
    for name, counts in report["categories"].items():
        for step in counts["yields"]:
            kept = f"{step['kept_share']:.1%}"
            lines.append(f"| {name} | {step['step']} | {step['came']:,} | {step['rejected']:,} | {kept} |")
    lines += ["", "## Prompts", "", "SHA-256 of each category's prompts.", "", "| category | hash |", "|---|---|"]
    lines += [f"| {name} | `{counts['prompts_sha256']}` |" for name, counts in report["categories"].items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
