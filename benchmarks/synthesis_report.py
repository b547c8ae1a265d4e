"""The tables of the data engine, which `report.py` writes together with its own."""

from pathlib import Path

from blocks import (
    BYTES_PER_MIB,
    NOT_MEASURED,
    PAGES,
    RESULTS,
    Result,
    Table,
    format_spread,
    load_results,
    replace_block,
)
from budget_report import markdown

DOCUMENT = PAGES / "synthesis.md"
COLUMNS = {"CPU": "synthesis_cpu.json"}


def measured_with(part: Result) -> str:
    versions = part["versions"]
    return f"{part['machine']['device']}, Python {versions['python']}, datatrove {versions['datatrove']}"


FILTERS = Table("filters", DOCUMENT, COLUMNS, [], measured_with)
RUN = Table("drawn records", DOCUMENT, COLUMNS, [], measured_with)


def kinds(cases: list[Result], fault: bool) -> str:
    """List kinds of records, with numbers where not all or none of them were rejected."""
    names = []
    for case in cases:
        if case["fault"] == fault:
            right = case["rejected"] if fault else case["records"] - case["rejected"]
            names.append(case["name"] + (f" ({right} of {case['records']})" if right < case["records"] else ""))
    return ", ".join(names)


def render_filters(result: Result | None) -> str:
    """Write one row per filter, with numbers after kinds where not all records were treated correctly."""
    if result is None or "filters" not in result:
        return f"{NOT_MEASURED}."
    part = result["filters"]
    rows = []
    for found in part["filters"]:
        amounts = [sum(c["records"] for c in found["cases"] if c["fault"] == fault) for fault in (True, False)]
        shares = [f"{found[name]:.3f}" for name in ("precision", "recall")]
        names = [kinds(found["cases"], fault) for fault in (True, False)]
        rows.append([f"`{found['name']}`", *shares, *map(str, amounts), *names])
    head = ["filter", "precision", "recall", "faulty", "sound", "faults", "sound ones that look faulty"]
    conditions = f"{part['cases']} records of each kind and category, seed {part['seed']}."
    return "\n".join([*markdown(head, rows), "", conditions])


def render_run(result: Result | None) -> str:
    """Write throughput, scaling and memory."""
    if result is None or "run" not in result:
        return f"{NOT_MEASURED}."
    part = result["run"]
    short, long = part["short"], part["long"]
    mebibytes = [f"{part[name]['peak_bytes'] / BYTES_PER_MIB:.0f} MiB" for name in ("short", "long")]
    rows = [
        ["the command with one record", f"{format_spread(part['start_seconds'], '.1f')} s"],
        [
            f"records per second, {short['records']:,} records, one worker",
            format_spread(short["records_per_second_one_worker"], ".0f") or NOT_MEASURED,
        ],
        ["two workers, times as fast as one", format_spread(short["speedup_two_workers"]) or NOT_MEASURED],
        [
            f"records per second and worker, {part['records']:,} records, {long['workers']} workers",
            f"{long['records_per_second_and_worker']:.0f}",
        ],
        [f"peak memory of the largest process, {short['records']:,} records", mebibytes[0]],
        [f"peak memory of the largest process, {part['records']:,} records", mebibytes[1]],
    ]
    return "\n".join([*markdown(["figure", "measured"], rows), "", f"{measured_with(part)}. Start included."])


def update(document: str, folder: Path) -> str:
    """Return the document with both tables from the results in `folder`."""
    result = load_results(FILTERS, folder)["CPU"]
    document = replace_block(document, FILTERS, render_filters(result))
    return replace_block(document, RUN, render_run(result))


def write() -> None:
    """Update the document from the committed results."""
    DOCUMENT.write_text(update(DOCUMENT.read_text(), RESULTS))
