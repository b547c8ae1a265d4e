"""`fusion-hf build`: an untrained FUSION of two backbones. Imports nothing heavy before it must."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fusion_hf.cli.convert import add_shared_arguments, print_result, run_command
from fusion_hf.cli.model_options import make_options
from fusion_hf.cli.parser import Parser
from fusion_hf.conversion.inputs import DECODER_TYPES, NO_TOKENIZER, BuildOptions, find_build_inputs
from fusion_hf.conversion.model_files import ConversionError, parse_query_lens

DESCRIPTION = (
    "Make an untrained FUSION from a language model and a SigLIP tower. The last layer, the final norm and the "
    "pooling head of the tower are dropped; projectors and samplers are new."
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `build`."""
    parser = commands.add_parser(
        "build", help="make an untrained model from a language model and a SigLIP tower", description=DESCRIPTION
    )
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build; returns the exit status."""
    return print_result(arguments, _build)


def make_parser() -> Parser:
    """Make the command line of `fusion-hf build`."""
    parser = Parser(prog="fusion-hf build", description=DESCRIPTION)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `build`."""
    defaults = BuildOptions("", "", Path())
    where = "DIR_OR_REPO"
    parser.add_argument("--text", required=True, metavar=where, help=f"language model: {', '.join(DECODER_TYPES)}")
    parser.add_argument("--vision", required=True, metavar=where, help="SigLIP model or SigLIP vision model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--tokenizer", metavar=f"{where}|{NO_TOKENIZER}", help="default: the language model's own")
    lengths = ",".join(map(str, defaults.query_lens))
    parser.add_argument(
        "--query-lens", type=_lengths, default=lengths, help="latent tokens to train with; default: %(default)s"
    )
    for name, text in (
        ("window_size", "side of a latent token's window"),
        ("num_samplers", "number of samplers"),
        ("start", "language model layer of the first sampler"),
        ("stride", "layers from one sampler to the next"),
        ("seed", "of the new parts"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name), help=f"{text}; default: %(default)s")
    add_shared_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(make_parser(), _build, argv)


def _build(arguments: argparse.Namespace) -> str:
    options = make_options(BuildOptions, arguments)
    inputs = find_build_inputs(options)
    from fusion_hf.conversion.from_backbones import build

    return build(options, inputs)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(parse_query_lens(text))
    except ConversionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
