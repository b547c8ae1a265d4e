"""`fusion-hf train`: a training run, as its recipe says."""

import argparse
import logging
import sys

from fusion_hf.cli.argument_types import config_file
from fusion_hf.cli.terminal import STOPPED


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `train`."""
    parser = commands.add_parser(
        "train",
        help="train a model as a recipe says",
        description="Train as a recipe says; run again, the same command goes on from the last complete checkpoint. "
        "All keys are in docs/training.md.",
    )
    parser.add_argument("recipe", type=config_file, metavar="RECIPE.yaml", help="one of configs/recipes, or your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as learning_rate=1e-5")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit status: STOPPED after a signal, when a checkpoint was written."""
    from fusion_hf.training.recipe import check_files, load_recipe

    values = load_recipe(arguments.recipe, arguments.overrides)
    check_files(values)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    from fusion_hf.training import run as training

    if training.run(values):
        return 0
    sys.stderr.write("stopped by a signal after writing a checkpoint: run the same command to go on.\n")
    return STOPPED
