"""The parser of all commands; imports nothing heavy."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fusion_hf.cli.terminal import USER_ERROR, one_line

REST = "--"  # behind which everything is positional


class Parser(argparse.ArgumentParser):
    """Takes options before, between and behind other arguments, and reports a wrong command line in one line."""

    commands: Any = None

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {one_line(message)} (see {self.prog} --help)\n")

    def add_subparsers(self, **kwargs: Any) -> Any:
        """Those of commands, which parse what stands behind their name."""
        self.commands = super().add_subparsers(**kwargs)
        return self.commands

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """
        As argparse does, but `key=value` may stand behind options: argparse takes all positional arguments of a
        command at the first of them, and none later.
        """
        given = sys.argv[1:] if args is None else list(args)
        if self.commands is None:
            # older versions of Python lose the mark there
            return super().parse_args(given) if REST in given else self.parse_intermixed_args(given)
        if not given or given[0] not in self.commands.choices:
            return super().parse_args(given)
        parsed = self.commands.choices[given[0]].parse_args(given[1:])
        setattr(parsed, self.commands.dest, given[0])
        return parsed
