"""The command `fusion-hf`. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_hf import __version__
from fusion_hf.cli import convert, data, demo, evaluate, export, maps, merge, plan, push, serve, synthesize, train
from fusion_hf.cli.parser import Parser
from fusion_hf.cli.terminal import guarded
from fusion_hf.cli.values import AUTO, device, dtype, positive, square

DEBUG = "--debug"
COMMANDS: Mapping[str, Any] = {
    "convert": convert,
    "maps": maps,
    "demo": demo,
    "train": train,
    "plan": plan,
    "merge": merge,
    "push": push,
    "export": export,
    "data": data,
    "evaluate": evaluate,
    "synthesize": synthesize,
    "serve": serve,
}
MAX_NEW_TOKENS = 256


class InsteadOf(argparse.Action):
    """An option whose value makes required arguments unnecessary."""

    def __init__(self, *args: Any, others: Sequence[argparse.Action], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.others = others

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        for other in self.others:
            other.required = False  # read after all arguments are; each command line has its own parser
        setattr(namespace, self.dest, values)


def make_parser() -> Parser:
    """The command line of `fusion-hf`."""
    parser = Parser(
        prog="fusion-hf", description="FUSION vision-language models: ask, chat, serve, train, evaluate, convert."
    )
    parser.add_argument("--version", action="version", version=f"fusion-hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shared = _shared_arguments()
    _add_ask(commands, shared)
    _add_chat(commands, shared)
    maps.add_parser(commands, shared)
    demo.add_parser(commands, shared)
    train.add_parser(commands)
    plan.add_parser(commands)
    merge.add_parser(commands)
    data.add_parser(commands)
    push.add_parser(commands)
    export.add_parser(commands)
    evaluate.add_parser(commands)
    synthesize.add_parser(commands)
    serve.add_parser(commands, _shared_arguments(serve.DEFAULTS.answer_tokens))
    convert.add_parser(commands)
    return parser


def _add_ask(commands: Any, shared: argparse.ArgumentParser) -> None:
    ask = commands.add_parser(
        "ask",
        parents=[shared],
        help="answer a question about one or more pictures, or a file of questions",
        description="Answer a question about one picture, or about several: one line for each, after its name. Or "
        "answer a file of questions: a run that was killed goes on with the same command.",
    )
    images = ask.add_argument("images", nargs="+", metavar="IMAGE", help="a picture file, or an http(s) address")
    question = ask.add_argument("question", metavar="QUESTION", help="in quotation marks")
    ask.add_argument(
        "--input",
        action=InsteadOf,
        others=(images, question),
        metavar="JSONL",
        help='instead of both, a file with a record per line: {"question", "image" (optional), "id" (optional)}',
    )
    ask.add_argument("--output", metavar="JSONL", help='with --input: a new file for {"id", "answer" or "error"}')
    ask.add_argument(
        "--batch-size", type=positive, metavar="N", help="with --input: questions answered together; default: 8"
    )
    ask.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="QUESTION",
        help="another question about the same pictures, answered by itself in a line of its own; may be repeated",
    )


def _add_chat(commands: Any, shared: argparse.ArgumentParser) -> None:
    chat = commands.add_parser(
        "chat",
        parents=[shared],
        help="talk about a picture",
        description="Talk about a picture: a question per line. /reset begins anew, /exit leaves.",
    )
    chat.add_argument("image", metavar="IMAGE", help="a picture file, or an http(s) address")
    chat.add_argument(
        "--fast",
        action="store_true",
        help="later answers begin sooner: the picture stays as seen with the first question in mind",
    )


def _shared_arguments(max_new_tokens: int = MAX_NEW_TOKENS) -> Parser:
    shared = Parser(add_help=False)
    shared.add_argument(
        "--model", metavar="DIR_OR_REPO", help="a model folder or a Hub repository; default: the bundled fusion-nano"
    )
    shared.add_argument(
        "--query-len",
        type=square,
        metavar="N",
        help="latent tokens per question, a perfect square: more of them look more closely; default: the model's",
    )
    shared.add_argument(
        "--image-token-grid",
        type=positive,
        metavar="N",
        help="side of the grid of image tokens: a smaller one is faster and sees less; default: the model's",
    )
    shared.add_argument(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help="longest answer; default: %(default)s",
    )
    shared.add_argument(
        "--device",
        type=device,
        default=AUTO,
        help="cpu, cuda, cuda:1, mps or auto (default: cuda, else mps, else cpu)",
    )
    shared.add_argument(
        "--dtype",
        type=dtype,
        default=AUTO,
        help="float32, bfloat16, float16 or auto (default: bfloat16 on cuda, else float32)",
    )
    shared.add_argument(DEBUG, action="store_true", help="show where an error comes from, and the libraries' notes")
    return shared


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        argv: the arguments; None: the process's own.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(given), DEBUG in given)


def _run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    if arguments.command in COMMANDS:
        return COMMANDS[arguments.command].run(arguments)
    if arguments.command == "ask":
        from fusion_hf.cli import ask

        return ask.run(arguments)
    from fusion_hf.cli import chat

    return chat.run(arguments)
