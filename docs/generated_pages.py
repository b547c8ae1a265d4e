"""Writes the reference pages that are made from the code: the command line, and those of `generated_reference`.

Sphinx calls `write_pages` before it reads the pages (docs/conf.py).
"""

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from generated_reference import PAGES

from fusion_hf.cli import make_parser
from fusion_hf.cli.parser import Parser

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = "generated"


def write_pages(app: "Sphinx") -> None:
    """Write all generated pages below the folder of the sources."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    for name, page in make_pages().items():
        path = folder / name
        if not path.is_file() or path.read_text("utf-8") != page:  # an unchanged page is not built again
            path.write_text(page, "utf-8")


@cache
def make_pages() -> dict[str, str]:
    """Make the text of all generated pages, by file name."""
    return {name: make() for name, make in {"cli.md": command_page, **PAGES}.items()}


def command_page() -> str:
    """Make the page of the command line from the parsers of all commands."""
    parser = make_parser()
    lines = [
        "# Command line",
        "",
        "`fusion-hf COMMAND --help` prints what this page says about a command. `python -m fusion_hf` is the same",
        "program.",
        "",
    ]
    helps = {choice.dest: choice.help for choice in parser.commands._choices_actions}
    for title, names in parser.groups.items():
        lines += [f"**{title}**", "", "| command | what it does |", "|---|---|"]
        lines += [f"| [`{name}`](#fusion-hf-{name}) | {_cell(helps[name])} |" for name in names]
        lines.append("")
    for name, command in parser.commands.choices.items():
        lines += [f"## fusion-hf {name}", "", *_command(command)]
        if command.commands is not None:
            for inner, inner_parser in command.commands.choices.items():
                lines += [f"### fusion-hf {name} {inner}", "", *_command(inner_parser)]
    return "\n".join(lines)


def _command(parser: Parser) -> Iterator[str]:
    """Describe a command: what it does, its usage, examples, its arguments, and whatever else its help says."""
    yield from (parser.description or "", "", "```text", _usage(parser), "```", "")
    if parser.examples:
        yield from ("```bash", *parser.examples, "```", "")
    yield from _actions(parser)
    yield ""
    if parser.describe_more is not None:
        yield from ("```text", parser.describe_more(), "```", "")


def _usage(parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().rstrip()
    return usage.removeprefix("usage: ").replace("\n" + " " * len("usage: "), "\n")


def _actions(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield "| argument | meaning |"
    yield "|---|---|"
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
        if action.option_strings and action.nargs != 0:
            metavar = action.metavar or "{" + ",".join(map(str, action.choices or [action.dest.upper()])) + "}"
            names += f" `{metavar if isinstance(metavar, str) else ' '.join(metavar)}`"
        yield f"| {_cell(names)} | {_cell((action.help or '') % _values(parser, action))} |"


def _values(parser: argparse.ArgumentParser, action: argparse.Action) -> dict[str, object]:
    """What argparse puts in the place of `%(default)s` and the like."""
    return {**vars(action), "prog": parser.prog}


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ")
