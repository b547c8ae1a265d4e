"""The parser of all commands; imports nothing heavy."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from fusion_hf.cli.terminal import USER_ERROR, one_line

REST = "--"  # behind which everything is positional
EXAMPLES = "examples:"


class HelpFormatter(argparse.HelpFormatter):
    """A formatter that keeps the lines of a text with several, such as examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(f"{indent}{line}\n" for line in text.splitlines())
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """
    A parser that takes options before, between and behind other arguments and reports errors in one line.

    Attributes:
        groups: Titles of `--help`, each with the names of its commands.
        describe_more: Makes a text that `--help` has before the examples.
    """

    commands: Any = None
    groups: Mapping[str, Sequence[str]] = {}
    describe_more: Callable[[], str] | None = None

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any):
        kwargs.setdefault("formatter_class", HelpFormatter)
        if examples:
            kwargs["epilog"] = "\n".join([EXAMPLES, *(f"  {line}" for line in examples)])
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        for action in self._actions:
            if isinstance(action, argparse._HelpAction):
                action.help = "Show this help and exit."

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {one_line(message)} (see {self.prog} --help)\n")

    def add_subparsers(self, **kwargs: Any) -> Any:
        """Add subparsers as argparse does, and keep them as `commands`."""
        self.commands = super().add_subparsers(**kwargs)
        return self.commands

    def format_help(self) -> str:
        """Format the help as argparse does, with commands in groups and a text that is made when it is shown."""
        if not self.groups and self.describe_more is None:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        if self.groups:
            listed = {action.dest: action for action in self.commands._choices_actions}
            sections = {title: [listed[name] for name in names] for title, names in self.groups.items()}
            sections["options"] = self._optionals._group_actions
        else:
            sections = {str(group.title): group._group_actions for group in self._action_groups}
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if self.describe_more is not None:
            formatter.add_text(self.describe_more())
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """
        Parse arguments as argparse does, but allow `key=value` behind options.

        argparse takes all positional arguments of a command at the first of them, and none later.
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
