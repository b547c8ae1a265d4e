"""`fusion-hf build`: build an untrained FUSION from two backbones. Imports nothing heavy before it must."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fusion_hf.cli.convert import add_shared_arguments, print_result, run_command
from fusion_hf.cli.model_options import make_options
from fusion_hf.cli.parser import Parser
from fusion_hf.conversion.inputs import DECODER_TYPES, NO_TOKENIZER, BuildOptions, find_build_inputs
from fusion_hf.conversion.model_files import ConversionError, parse_query_lens

DESCRIPTION = (
    "Build an untrained model from a language model and a SigLIP vision tower. The last layer, the final norm and the "
    "pooling head of the tower are dropped. The projectors and samplers are randomly initialized and must be trained."
)
EXAMPLES = (
    "fusion-hf build --text Qwen/Qwen3-0.6B --vision google/siglip-so400m-patch14-384 --dry-run",
    "fusion-hf build --text Qwen/Qwen3-0.6B --vision google/siglip-so400m-patch14-384 --output untrained",
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `build` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "build", help="Build an untrained model from two backbones.", description=DESCRIPTION, examples=EXAMPLES
    )
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build the model, and return the exit status."""
    return print_result(arguments, _build)


def make_parser() -> Parser:
    """Make the command line of `fusion-hf build`."""
    parser = Parser(prog="fusion-hf build", description=DESCRIPTION, examples=EXAMPLES)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `build`."""
    defaults = BuildOptions("", "", Path())
    where = "DIR_OR_REPO"
    parser.add_argument(
        "--text",
        required=True,
        metavar=where,
        help=f"The language model, of one of the types {', '.join(DECODER_TYPES)}.",
    )
    parser.add_argument(
        "--vision", required=True, metavar=where, help="The vision tower: a SigLIP model or a SigLIP vision model."
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="The folder to write, which must not exist. Required unless --dry-run is given.",
    )
    parser.add_argument(
        "--tokenizer",
        metavar=f"{where}|{NO_TOKENIZER}",
        help="The tokenizer, or none to write no tokenizer (default: that of the language model).",
    )
    lengths = ",".join(map(str, defaults.query_lens))
    parser.add_argument(
        "--query-lens",
        type=_lengths,
        default=lengths,
        metavar="N,...",
        help="Numbers of latent tokens to train with, separated by commas (default: %(default)s).",
    )
    for name, text in (
        ("window_size", "Side of the window of a latent token, in image tokens"),
        ("num_samplers", "Number of samplers"),
        ("start", "Index of the language model's layer that the first sampler follows"),
        ("stride", "Number of layers from one sampler to the next"),
        ("seed", "Seed of the random weights"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=int, default=getattr(defaults, name), metavar="N", help=f"{text} (default: %(default)s)."
        )
    parser.add_argument("--dry-run", action="store_true", help="Check that the backbones fit; write nothing.")
    add_shared_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit status."""
    return run_command(make_parser(), _build, argv)


def _build(arguments: argparse.Namespace) -> str:
    if arguments.output is None and not arguments.dry_run:
        raise ConversionError("`--output` is required unless `--dry-run` is given.")
    options = make_options(BuildOptions, arguments)
    inputs = find_build_inputs(options)
    from fusion_hf.conversion.from_backbones import build

    return build(options, inputs)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(parse_query_lens(text))
    except ConversionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
