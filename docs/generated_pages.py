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
        "| command | what it does |",
        "|---|---|",
    ]
    helps = {choice.dest: choice.help for choice in parser.commands._choices_actions}
    lines += [f"| [`{name}`](#fusion-hf-{name}) | {_cell(helps[name])} |" for name in parser.commands.choices]
    for name, command in parser.commands.choices.items():
        lines += ["", f"## fusion-hf {name}", "", command.description or "", ""]
        lines += ["```text", _usage(command), "```", ""]
        lines += _actions(command)
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, inner_parser in action.choices.items():
                    lines += ["", f"### fusion-hf {name} {inner}", "", inner_parser.description or "", ""]
                    lines += ["```text", _usage(inner_parser), "```", "", *_actions(inner_parser)]
    return "\n".join(lines) + "\n"


def _usage(parser: argparse.ArgumentParser) -> str:
    return parser.format_usage().removeprefix("usage: ").rstrip()


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
