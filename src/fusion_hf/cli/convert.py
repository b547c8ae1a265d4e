"""`fusion-hf convert`: a checkpoint of the authors to a model folder. `conversion/cli.py` has its arguments."""

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `convert`."""
    from fusion_hf.conversion import cli  # which takes its parser from this package

    parser = commands.add_parser(
        "convert", help="turn a checkpoint of the authors into a model folder", description=cli.DESCRIPTION
    )
    cli.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns the exit status."""
    from fusion_hf.conversion import cli

    return cli.run(arguments, cli.convert)
