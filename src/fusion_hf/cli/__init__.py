"""The command `fusion-hf`. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_hf import __version__
from fusion_hf.cli import (
    ask,
    build,
    cache,
    chat,
    compare,
    convert,
    data,
    demo,
    evaluate,
    export,
    init_recipe,
    maps,
    merge,
    plan,
    push,
    serve,
    synthesize,
    train,
    verify,
)
from fusion_hf.cli.model_options import DEBUG
from fusion_hf.cli.parser import Parser
from fusion_hf.cli.terminal import guarded

# in the order of `--help`; each has `add_parser` and `run`
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "Use a model": {"ask": ask, "chat": chat, "serve": serve, "demo": demo, "maps": maps},
    "Train a model": {"init-recipe": init_recipe, "plan": plan, "train": train, "merge": merge},
    "Evaluate a model": {"evaluate": evaluate, "compare": compare},
    "Prepare data": {"data": data, "synthesize": synthesize},
    "Convert and publish a model": {
        "convert": convert,
        "verify": verify,
        "build": build,
        "export": export,
        "push": push,
        "cache": cache,
    },
}
COMMANDS: Mapping[str, Any] = {name: command for group in GROUPS.values() for name, command in group.items()}


def make_parser() -> Parser:
    """Make the command line of `fusion-hf`."""
    parser = Parser(
        prog="fusion-hf",
        description="Use, train, evaluate, convert and publish FUSION vision-language models. "
        "`fusion-hf COMMAND --help` describes a command.",
        examples=['fusion-hf ask photo.jpg "What is in the image?"', "fusion-hf serve --model DIR_OR_REPO"],
    )
    parser.add_argument("--version", action="version", version=f"fusion-hf {__version__}", help="Show the version.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        command.add_parser(commands)
    parser.groups = {title: tuple(group) for title, group in GROUPS.items()}
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv: The arguments; None: those of the process.

    Returns:
        The exit status.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(given, argv is None), DEBUG in given)


def _run(argv: list[str], owns_process: bool) -> int:
    arguments = make_parser().parse_args(argv)
    arguments.owns_process = owns_process
    return COMMANDS[arguments.command].run(arguments)
