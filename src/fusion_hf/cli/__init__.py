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
COMMANDS: Mapping[str, Any] = {
    "ask": ask,
    "chat": chat,
    "maps": maps,
    "demo": demo,
    "init-recipe": init_recipe,
    "train": train,
    "plan": plan,
    "merge": merge,
    "data": data,
    "push": push,
    "export": export,
    "evaluate": evaluate,
    "compare": compare,
    "synthesize": synthesize,
    "serve": serve,
    "convert": convert,
    "build": build,
    "verify": verify,
    "cache": cache,
}


def make_parser() -> Parser:
    """Make the command line of `fusion-hf`."""
    parser = Parser(
        prog="fusion-hf", description="FUSION vision-language models: ask, chat, serve, train, evaluate, convert."
    )
    parser.add_argument("--version", action="version", version=f"fusion-hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        argv: the arguments; None: the process's own.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(given, argv is None), DEBUG in given)


def _run(argv: list[str], owns_process: bool) -> int:
    arguments = make_parser().parse_args(argv)
    arguments.owns_process = owns_process
    return COMMANDS[arguments.command].run(arguments)
