"""`fusion-hf convert`, and what its sister script shares with it: one-line errors and exit statuses."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fusion_hf.conversion.checkpoint import first_line
from fusion_hf.conversion.convert import Options, convert
from fusion_hf.conversion.errors import ConversionError
from fusion_hf.conversion.tokenizer import NO_TOKENIZER

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
USER_ERROR, INTERRUPTED = 2, 130  # exit statuses


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other error, in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConversionError(f"{message} (see --help)")


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command of this kind has."""
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as most of them are stored")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result in one commit")
    parser.add_argument("--private", action="store_true", help="make that repository private if it is new")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run_command(parser: Parser, function: Callable[[argparse.Namespace], str], argv: Sequence[str] | None) -> int:
    """Parse, run, print the resulting line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        sys.stdout.write(function(parser.parse_args(arguments)) + "\n")
    except (ConversionError, OSError) as error:
        if debug:
            raise
        sys.stderr.write(f"error: {first_line(error)}.\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was written.\n")
        return INTERRUPTED
    return 0


def make_parser() -> Parser:
    """The command line of `fusion-hf convert`."""
    parser = Parser(
        prog="fusion-hf convert",
        description="Convert a checkpoint of the authors' FUSION code to a complete Hub folder. Everything is checked "
        "before anything is written, and at most one shard is in memory.",
    )
    where = "DIR_OR_REPO"
    parser.add_argument("--checkpoint", required=True, metavar=where, help="the authors' checkpoint")
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
        type=int,
        metavar="SIDE",
        help="write a FUSION-L configuration: the same weights, with image features reduced to SIDE x SIDE "
        "(published: 16)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check keys and shapes from the headers; write nothing")
    add_shared_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(make_parser(), _convert, argv)


def _convert(arguments: argparse.Namespace) -> str:
    if arguments.output is None and not arguments.dry_run:
        raise ConversionError("--output is needed unless --dry-run is given.")
    return convert(
        Options(
            checkpoint=arguments.checkpoint,
            output=arguments.output,
            vision_config=arguments.vision_config,
            tokenizer=arguments.tokenizer,
            base=arguments.base,
            dtype=DTYPES.get(arguments.dtype),
            image_token_grid=arguments.image_token_grid,
            push_to_hub=arguments.push_to_hub,
            private=arguments.private,
            dry_run=arguments.dry_run,
        )
    )
