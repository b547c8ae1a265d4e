"""The table of a run of `gpu.py`, which `report.py` writes together with its own."""

import json
from pathlib import Path
from typing import Any

from blocks import NOT_MEASURED, PAGES, RESULTS, Block, Result, replace_block
from gpu_schedule import SUMMARY

DOCUMENT = PAGES / "gpu.md"
TABLE = Block("GPU run", DOCUMENT)


def found(part: dict[str, Any]) -> str:
    """Write the result of a part, and how it ended, in one cell."""
    result = part["result"] or {}
    words = [f"{count} {name}" for name, count in result.get("tests", {}).items()]
    words += [f"failed: `{name}`" for name in result.get("failed", {})]
    words += [
        f"{name}: {count['equal']} of {count['of']} ids" for name, count in result.get("equal_tokens", {}).items()
    ]
    words += [f"{name}: {error.splitlines()[0]}" for name, error in result.get("errors", {}).items() if error]
    words += [f"not installed: {name}" for name in result.get("missing", [])]
    words += part["error"].splitlines()[:1]
    return "; ".join(words).replace("|", "\\|")


def render(summary: Result | None) -> str:
    """Write the table and its conditions."""
    if summary is None:
        return f"{NOT_MEASURED}."
    lines = ["| part | status | seconds | found |", "|---|---|---|---|"]
    for name, part in summary["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} | {found(part)} |")
    machine = summary["parts"].get("machine", {}).get("result")
    if machine is not None:
        torch, transformers = (machine["versions"][name] for name in ("torch", "transformers"))
        lines += ["", f"{machine['machine']['device']}, torch {torch}, transformers {transformers}."]
    return "\n".join(lines)


def load(folder: Path) -> Result | None:
    path = folder / SUMMARY
    return json.loads(path.read_text()) if path.is_file() else None


def update(document: str, folder: Path) -> str:
    """Return the document with the table from the result in `folder`."""
    return replace_block(document, TABLE, render(load(folder)))


def write() -> None:
    """Update the document."""
    DOCUMENT.write_text(update(DOCUMENT.read_text(), RESULTS))
