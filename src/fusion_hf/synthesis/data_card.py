"""Write the data card of a run, and its contact sheet as an image and as a page."""

import html
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image, ImageDraw, ImageOps

from fusion_hf.common.endpoints import data_uri
from fusion_hf.common.outputs import write_atomically
from fusion_hf.data.record_parsing import HUMAN, IMAGE_TOKEN
from fusion_hf.synthesis.balance import LONGER
from fusion_hf.synthesis.image_generation import encode_png
from fusion_hf.synthesis.run_config import DRAWN_LICENSE, PROCEDURAL
from fusion_hf.synthesis.shards import read_records
from fusion_hf.synthesis.summary import Summary

CARD, SHEET, PAGE = "README.md", "contact_sheet.png", "contact_sheet.html"
SIDE, GAP, LABEL = 192, 8, 20  # sizes in pixels: of the box of an image, the gap between boxes, and a line of text
COLUMNS = 4
# The page runs no code and embeds its images, since browsers do not let local pages read other files.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:auto}"
    "section{display:flex;gap:1em;align-items:flex-start}"
    f"img{{width:{SIDE}px;flex:none}}dl{{margin:0}}"
    "dt{font-weight:bold}dt,dd{white-space:pre-line}"  # keeps one option or step per line
)
NOT_RUN, NONE_CAME = "not run", "no records"
UNKNOWN_LICENSE = "unknown"  # the Hub's identifier
MOST_SHOWN = 6  # maximum number of answers shown per form
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


class Sample(NamedTuple):
    """A written record that the contact sheet shows."""

    category: str
    record: dict[str, Any]
    image: Image.Image


def write_card(data: Path, report: dict[str, Any], summary: Summary, mixtures: list[Path], kind: str) -> None:
    """
    Write the data card and, if there are records to show, the contact sheet.

    Args:
        data: the folder of the data.
        report: the report of the run.
        summary: the counts of the run.
        mixtures: the mixture files.
        kind: `tar` or `parquet`.
    """
    samples = list(_samples(data, summary, kind))
    if samples:
        write_atomically(data / SHEET, _sheet(samples))
        write_atomically(data / PAGE, contact_page(samples).encode("utf-8", "backslashreplace"))
    write_atomically(data / CARD, _card(report, mixtures, bool(samples)).encode("utf-8", "backslashreplace"))


def _samples(data: Path, summary: Summary, kind: str) -> Iterator[Sample]:
    """Yield samples in the order of categories. Shards are read until all samples are found."""
    wanted = {identity for category in summary.categories.values() for identity in category.samples}
    found: dict[str, Sample] = {}
    for record, image in chain.from_iterable(map(read_records, sorted(data.glob(f"stage*/*.{kind}")))):
        if record["id"] in wanted:
            found[record["id"]] = Sample(record["category"], record, _thumbnail(image))
        if len(found) == len(wanted):
            break
    for _, category in sorted(summary.categories.items()):
        yield from (found[identity] for identity in category.samples if identity in found)


def _thumbnail(content: bytes) -> Image.Image:
    with Image.open(BytesIO(content), formats=("PNG",)) as image:
        return ImageOps.contain(image.convert("RGB"), (SIDE, SIDE))


def _sheet(samples: list[Sample]) -> bytes:
    groups = [list(group) for _, group in groupby(samples, lambda sample: sample.category)]
    rows = [group[begin : begin + COLUMNS] for group in groups for begin in range(0, len(group), COLUMNS)]
    height = SIDE + LABEL + GAP
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, len(rows) * height + GAP), WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = GAP + number * height
        draw.text((GAP, top), row[0].category, fill=BLACK)
        for column, sample in enumerate(row):
            sheet.paste(sample.image, (GAP + column * (SIDE + GAP), top + LABEL))
    return encode_png(sheet)


def contact_page(samples: list[Sample]) -> str:
    """
    Write a page with the image and the turns of each sample. Texts are escaped, and the page runs no code.

    Args:
        samples: the samples.
    """
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Contact sheet</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<style>{STYLE}</style>",
    ]
    for sample in samples:
        name = html.escape(sample.record["id"])
        source = data_uri(encode_png(sample.image), "image/png")
        parts.append(f"<h2>{html.escape(sample.category)}: {name}</h2>")
        parts.append(f'<section><img src="{source}" alt="{name}"><dl>')
        for turn in sample.record["conversations"]:
            tag = "dt" if turn["from"] == HUMAN else "dd"
            text = turn["value"].removeprefix(f"{IMAGE_TOKEN}\n")
            parts.append(f"<{tag}>{html.escape(text)}</{tag}>")
        parts.append("</dl></section>")
    return "\n".join(parts) + "\n"


def _card(report: dict[str, Any], mixtures: list[Path], has_sheet: bool) -> str:
    header = {
        "license": report["license"] or UNKNOWN_LICENSE,
        "task_categories": ["visual-question-answering"],
        "language": ["en"],
        "tags": ["synthetic"],
    }
    rejected = report["records"] - report["written"]
    others = "The others were rejected, with their reasons in `rejected/`" if rejected else "None was rejected"
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", "", "# Synthesized visual questions", ""]
    lines += [
        f"{report['written']:,} of {report['records']:,} records were written. {others}. "
        f"Backend: {report['backend']}. Seed: {report['seed']}.",
        "",
        "`fusion-hf synthesize` made this data. To train on it, set `data` in a recipe to one of these mixtures: "
        + (", ".join(f"`{path.name}`" for path in mixtures) or "none"),
        "",
    ]
    if has_sheet:
        lines += [f"![Sample images by category]({SHEET})", "", f"Their questions are in `{PAGE}`.", ""]
    lines += ["## License", "", _license(report), "", "## Composition", ""]
    categories = report["categories"].items()
    keys = ("records", "written", "turns", "words")
    counts = [[name, each["stage"], *(f"{each[key]:,}" for key in keys)] for name, each in categories]
    lines += _table("category | stage | started | written | turns | words of answers", counts)
    models = [
        [step, _cell(name), f"{number:,}"] for step, used in report["models"].items() for name, number in used.items()
    ]
    lines += ["", "## Models", "", *_table("step | model | records", models)]
    # frequencies of the right answers of each form of question, in descending order
    answers = [
        [name, _cell(form), f"{sum(found.values()):,}", _shares(found)]
        for name, each in categories
        for form, found in each["answers"].items()
    ]
    lines += ["", "## Balance of the answers", ""]
    lines += _table("category | question begins | answers | shares of short answers", answers)
    yields = [[name, step["step"], *_yield(step)] for name, each in categories for step in each["yields"]]
    lines += ["", "## Yield of each step", "", *_table("category | step | reached | rejected | kept", yields)]
    if report["backend"] == PROCEDURAL:
        return "\n".join([*lines, "", "This backend uses no model and no prompts."]) + "\n"
    hashes = [[name, f"`{each['prompts_sha256']}`"] for name, each in categories]
    lines += [
        "",
        "## Prompts",
        "",
        "The SHA-256 of the prompts of each category:",
        "",
        *_table("category | hash", hashes),
    ]
    return "\n".join(lines) + "\n"


def _table(head: str, rows: list[list[str]]) -> list[str]:
    """Write a Markdown table. `head` holds the column names, separated by bars."""
    return [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _license(report: dict[str, Any]) -> str:
    if report["license"] is None:
        terms = "it depends on the captions and on the terms of the models below"
        return f"To be stated by you, since {terms}. Set the key `license` of the configuration."
    if report["backend"] == PROCEDURAL and report["license"] == DRAWN_LICENSE:
        source = "the license of fusion_hf, whose templates produced all images and texts"
        return f"`{DRAWN_LICENSE}`, {source}. The key `license` of the configuration overrides it."
    return f"`{report['license']}`, as set in the configuration of the run."


def _shares(answers: Mapping[str, int]) -> str:
    short = sorted(((-count, value) for value, count in answers.items() if value != LONGER))
    total = -sum(count for count, _ in short)
    shown = [f"{_cell(value)} {-count / total:.1%}" for count, value in short[:MOST_SHOWN]]
    if len(short) > MOST_SHOWN:
        shown.append(f"{len(short) - MOST_SHOWN} more")
    return ", ".join(shown) or "none"


def _yield(step: dict[str, Any]) -> list[str]:
    if not step["ran"]:
        return ["", "", NOT_RUN]
    kept = NONE_CAME if step["kept_share"] is None else f"{step['kept_share']:.1%}"
    return [f"{step['came']:,}", f"{step['rejected']:,}", kept]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
