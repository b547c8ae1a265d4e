"""`fusion-hf data check`: count the records of a dataset, and what is missing or broken."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_hf.cli.argument_types import config_file, positive
from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, JSON_HELP
from fusion_hf.cli.terminal import FAILED, one_line, printable
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_place
from fusion_hf.data.image_places import ImagePlaces
from fusion_hf.data.record_parsing import ON_TRUNCATED

if TYPE_CHECKING:
    from fusion_hf.data.check import EntryReport

IMAGES = ("sample", "decode", "exist", "none")
# options for keys of a recipe that say where images may be
PLACES = (
    ("--image-root", "DIR", "A further folder of images, to which absolute paths and links may lead."),
    ("--allow-image-host", "HOST", "Fetch images from this host."),
    ("--allow-private-image-host", "HOST", "Fetch images from this host of a private network or of this machine."),
)
HEADER = ("file", "taken", "records", "size", "no image", "broken")
UNITS = ("B", "kB", "MB", "GB", "TB")


def add_parser(commands: Any) -> None:
    """Add `data` and its own command to the subparsers of `fusion-hf`."""
    data = commands.add_parser(
        "data", help="Check training data.", description="Check training data before a run reads them."
    )
    data_commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    check = data_commands.add_parser(
        "check",
        help="Count records, broken records and missing images.",
        description="Count the records, the bytes, the broken records and the missing images of a mixture or a file "
        "of records. Requires the extra `train`. The exit status is 0 if everything is fine, 1 if something is "
        "missing or broken and 2 for wrong input.",
        examples=("fusion-hf data check records.json", "fusion-hf data check mixture.yaml --images decode --json"),
    )
    check.add_argument(
        "source",
        type=config_file,
        metavar="MIXTURE_OR_FILE",
        help="A mixture (.yaml), a file or folder of records, or a Hub dataset.",
    )
    check.add_argument(
        "--data-root",
        metavar="DIR",
        help="The folder of relative paths and images (default: the folder of the file).",
    )
    check.add_argument(
        "--images",
        choices=IMAGES,
        default="sample",
        help="What to check of the images: exist (all files are there), sample (exist, and some images of each file "
        "are "
        "decoded), decode (all images are decoded) or none (default: %(default)s).",
    )
    check.add_argument(
        "--on-truncated",
        choices=ON_TRUNCATED,
        default="error",
        help="Whether a truncated image is broken, as in a recipe (default: %(default)s).",
    )
    check.add_argument(
        "--max-image-pixels",
        type=positive,
        metavar="N",
        help="Maximum number of pixels of an image, as in a recipe (default: that of the image processor).",
    )
    for option, metavar, text in PLACES:
        check.add_argument(option, action="append", metavar=metavar, help=f"{text} May be repeated.")
    check.add_argument(
        "--data-cache",
        metavar="DIR",
        help="The folder of the index of records, as in a recipe (default: $HF_HOME/fusion_hf/data, or "
        "~/.cache/fusion_hf/data).",
    )
    check.add_argument("--json", action="store_true", help=JSON_HELP)
    check.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Check the data, and return the exit status."""
    require(("datasets", "pyarrow"), "Training data", "train")
    from fusion_hf.data.mixture import read_entries

    entries = read_entries(arguments.source, arguments.data_root)
    if len(entries) == 1:
        entries[0].locate()  # what was named does not exist: no finding, but a wrong command line
    places = ImagePlaces.named(arguments.image_root, arguments.allow_image_host, arguments.allow_private_image_host)
    from fusion_hf.data.index import default_cache

    cache = default_cache() if arguments.data_cache is None else Path(arguments.data_cache).expanduser()
    check_place(cache, "--data-cache")
    import datasets
    from tqdm import tqdm

    from fusion_hf.data.check import ImageChecks, check_entry
    from fusion_hf.data.dataset import MAX_IMAGE_PIXELS

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    max_pixels = arguments.max_image_pixels if arguments.max_image_pixels is not None else MAX_IMAGE_PIXELS
    checks = ImageChecks(arguments.images, max_pixels, arguments.on_truncated, places)
    reports = [
        check_entry(entry, cache, checks)
        for entry in tqdm(entries, desc="data check", unit="file", disable=None, leave=False)
    ]
    write = _write_json if arguments.json else _write_table
    write(reports)
    if arguments.images == "sample" and not arguments.json:
        _write_sample(reports)
    return 0 if all(report.fine for report in reports) else FAILED


def _write_json(reports: "Sequence[EntryReport]") -> None:
    content = {
        "fine": all(report.fine for report in reports),
        "records": sum(report.records for report in reports),
        "taken": sum(report.taken for report in reports),
        "entries": [asdict(report) for report in reports],
    }
    json.dump(content, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _write_table(reports: "Sequence[EntryReport]") -> None:
    rows: list[tuple[str, ...]] = [HEADER]
    for report in reports:
        if report.error is None:
            broken = sum(report.problems.counts.values())
            rows.append(_row(report.name, report.taken, report.records, report.size, report.without_image, broken))
        else:
            rows.append((printable(report.name), "-", "-", "-", "-", "cannot be read"))
    there = [report for report in reports if report.error is None]
    sums = [[r.taken, r.records, r.size, r.without_image, sum(r.problems.counts.values())] for r in there]
    total = [sum(column) for column in zip(*sums, strict=True)] if sums else [0] * (len(HEADER) - 1)
    rows.append(_row(f"total: {len(there)} of {len(reports)} present", *total))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for name, *numbers in rows:
        aligned = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        sys.stdout.write("  ".join([name.ljust(widths[0]), *aligned]) + "\n")
    for line in _complaints(reports):
        sys.stdout.write(f"{line}\n")


def _write_sample(reports: "Sequence[EntryReport]") -> None:
    """Say how many images were decoded."""
    decoded, total = (sum(getattr(report, name) for report in reports) for name in ("decoded", "with_image"))
    advice = "; --images decode opens all" if decoded < total else ""
    sys.stdout.write(f"decoded: {decoded:,} of {total:,} images{advice}\n")


def _row(name: str, taken: int, records: int, size: int, without_image: int, broken: int) -> tuple[str, ...]:
    return (printable(name), f"{taken:,}", f"{records:,}", _bytes(size), f"{without_image:,}", f"{broken:,}")


def _complaints(reports: "Sequence[EntryReport]") -> list[str]:
    lines = []
    for report in reports:
        if report.error is not None:
            lines.append(f"not readable: {one_line(report.error)}")
        for kind, count in report.problems.counts.items():
            lines.append(f"{kind}: {count:,}, first {one_line(report.problems.first[kind])}")
    return lines


def _bytes(size: int) -> str:
    number, unit = float(size), 0
    while number >= 1000 and unit < len(UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.0f} {UNITS[unit]}" if unit == 0 else f"{number:.1f} {UNITS[unit]}"
