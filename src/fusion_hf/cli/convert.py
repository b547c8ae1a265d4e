"""`fusion-hf convert`, and what `fusion-hf build` shares with it. Imports nothing heavy before it must."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fusion_hf.cli.argument_types import positive
from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, make_options
from fusion_hf.cli.parser import Parser
from fusion_hf.cli.terminal import guarded
from fusion_hf.common.user_values import DTYPE_NAMES
from fusion_hf.conversion.inputs import NO_TOKENIZER, ConversionOptions, find_conversion_inputs
from fusion_hf.conversion.model_files import ConversionError

DESCRIPTION = (
    "Convert a checkpoint of the authors' FUSION code to a model folder. Everything is checked before anything is "
    "written, and at most one shard is in memory."
)
EXAMPLES = (
    "fusion-hf convert --model starriver030515/FUSION-Phi3.5-3B --dry-run",
    "fusion-hf convert --model starriver030515/FUSION-Phi3.5-3B --output fusion-3b",
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `convert` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "convert", help="Convert a checkpoint of the authors.", description=DESCRIPTION, examples=EXAMPLES
    )
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert the checkpoint, and return the exit status."""
    return print_result(arguments, convert)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `convert` and `build` share."""
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="Data type of the weights (default: that of most stored weights)."
    )
    parser.add_argument(
        "--repo-id", metavar="OWNER/NAME", help="Upload the result to this repository on the Hub, in one commit."
    )
    parser.add_argument("--private", action="store_true", help="Make the repository private if it is created.")
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run_command(parser: Parser, function: Callable[[argparse.Namespace], str], argv: Sequence[str] | None) -> int:
    """Parse the arguments, run the command, print its line, and return the exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        return guarded(lambda: print_result(parser.parse_args(given), function), DEBUG in given)
    except SystemExit as stopped:  # argparse's way, after its own line
        return int(stopped.code or 0)


def print_result(arguments: argparse.Namespace, function: Callable[[argparse.Namespace], str]) -> int:
    """Run the command, print its line, and return the exit status."""
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
    parser = Parser(prog="fusion-hf convert", description=DESCRIPTION, examples=EXAMPLES)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    where = "DIR_OR_REPO"
    parser.add_argument("--model", dest="checkpoint", required=True, metavar=where, help="The authors' checkpoint.")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="The folder to write, which must not exist. Required unless --dry-run is given.",
    )
    parser.add_argument(
        "--vision-config",
        metavar="FILE_DIR_OR_REPO",
        help="The sizes of the vision tower: a JSON file, or a SigLIP folder, whose weights are used if the "
        "checkpoint has no tower (default: the sizes of the tower that the checkpoint names).",
    )
    parser.add_argument(
        "--tokenizer",
        metavar=f"{where}|{NO_TOKENIZER}",
        help="The tokenizer, or none to write no tokenizer (default: that of the checkpoint or of its base).",
    )
    parser.add_argument("--base", metavar=where, help="The base model of a LoRA or adapter-only checkpoint.")
    parser.add_argument(
        "--image-token-grid",
        type=positive,
        metavar="SIDE",
        help="Write a FUSION-L configuration: the same weights, with SIDE x SIDE image tokens. The published "
        "FUSION-L models have 16.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Check the keys and shapes of the weights from their headers; write nothing.",
    )
    add_shared_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit status."""
    return run_command(make_parser(), convert, argv)


def convert(arguments: argparse.Namespace) -> str:
    """
    Convert the checkpoint.

    Args:
        arguments: The command line.

    Returns:
        A line that says what was done.

    Raises:
        InputError: If something does not fit; then nothing was written.
    """
    if arguments.output is None and not arguments.dry_run:
        raise ConversionError("`--output` is required unless `--dry-run` is given.")
    options = make_options(ConversionOptions, arguments)
    inputs = find_conversion_inputs(options)
    from fusion_hf.conversion.from_authors import convert

    return convert(options, inputs)
