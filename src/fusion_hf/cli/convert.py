"""`fusion-hf convert`, and what `fusion-hf build` shares with it. Imports nothing heavy before it must."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fusion_hf.cli.argument_types import positive
from fusion_hf.cli.model_options import DEBUG, make_options
from fusion_hf.cli.parser import Parser
from fusion_hf.cli.terminal import guarded
from fusion_hf.common.user_values import DTYPE_NAMES
from fusion_hf.conversion.inputs import NO_TOKENIZER, ConversionOptions, find_conversion_inputs
from fusion_hf.conversion.model_files import ConversionError

DESCRIPTION = (
    "Convert a checkpoint of the authors' FUSION code to a complete Hub folder. Everything is checked before anything "
    "is written, and at most one shard is in memory."
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `convert`."""
    parser = commands.add_parser(
        "convert", help="turn a checkpoint of the authors into a model folder", description=DESCRIPTION
    )
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns the exit status."""
    return print_result(arguments, convert)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command of this kind has."""
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="type of the weights; default: as most of them are stored"
    )
    parser.add_argument(
        "--repo-id", metavar="OWNER/NAME", help="upload the result to this repository of the Hub, in one commit"
    )
    parser.add_argument("--private", action="store_true", help="make that repository private if it is new")
    parser.add_argument(DEBUG, action="store_true", help="show where an error comes from")


def run_command(parser: Parser, function: Callable[[argparse.Namespace], str], argv: Sequence[str] | None) -> int:
    """Parse, run, print the resulting line; returns the exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        return guarded(lambda: print_result(parser.parse_args(given), function), DEBUG in given)
    except SystemExit as stopped:  # argparse's way, after its own line
        return int(stopped.code or 0)


def print_result(arguments: argparse.Namespace, function: Callable[[argparse.Namespace], str]) -> int:
    """Do what the arguments say, and print the resulting line."""
    # our warnings alone: the Hub's client writes its own lines itself
    notes = logging.StreamHandler(sys.stderr)
    notes.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("fusion_hf")
    logger.addHandler(notes)
    try:
        sys.stdout.write(function(arguments) + "\n")
    finally:
        logger.removeHandler(notes)
    return 0


def make_parser() -> Parser:
    """Make the command line of `fusion-hf convert`."""
    parser = Parser(prog="fusion-hf convert", description=DESCRIPTION)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    where = "DIR_OR_REPO"
    parser.add_argument("--model", dest="checkpoint", required=True, metavar=where, help="the authors' checkpoint")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder (needed unless --dry-run)")
    parser.add_argument(
        "--vision-config",
        metavar="FILE_DIR_OR_REPO",
        help="the tower's sizes: a JSON file or a SigLIP folder; default: those of the tower that the checkpoint "
        "names. A folder's weights are taken if the checkpoint has no tower",
    )
    parser.add_argument(
        "--tokenizer",
        metavar=f"{where}|{NO_TOKENIZER}",
        help="default: the checkpoint's own (or its base's)",
    )
    parser.add_argument("--base", metavar=where, help="what a LoRA or adapter-only run was trained on")
    parser.add_argument(
        "--image-token-grid",
        type=positive,
        metavar="SIDE",
        help="write a FUSION-L configuration: the same weights, with image features reduced to SIDE x SIDE "
        "(published: 16)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check keys and shapes from the headers; write nothing")
    add_shared_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(make_parser(), convert, argv)


def convert(arguments: argparse.Namespace) -> str:
    """Convert; returns a line that says what was done.

    Raises:
        InputError: for anything that does not fit; nothing is left behind then.
    """
    if arguments.output is None and not arguments.dry_run:
        raise ConversionError("--output is needed unless --dry-run is given.")
    options = make_options(ConversionOptions, arguments)
    inputs = find_conversion_inputs(options)
    from fusion_hf.conversion.from_authors import convert

    return convert(options, inputs)
