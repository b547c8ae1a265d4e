"""`fusion-hf train`: a training run, as its recipe describes."""

import argparse
import logging
import sys

from fusion_hf.cli.argument_types import config_file
from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP
from fusion_hf.cli.terminal import STOPPED


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `train` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "train",
        help="Train a model as a recipe describes.",
        description="Train a model as a recipe describes. If a run was interrupted, the same command resumes it from "
        "the last complete checkpoint. The exit status is 0 if the run is finished and 143 if a signal stopped it "
        "after a checkpoint was written.",
        examples=(
            "fusion-hf train recipe.yaml",
            "fusion-hf train recipe.yaml learning_rate=1e-5 num_train_epochs=2",
        ),
    )
    parser.add_argument(
        "recipe",
        type=config_file,
        metavar="RECIPE.yaml",
        help="The recipe: a file that `fusion-hf init-recipe` wrote, your own, or one of configs/recipes in the "
        "package.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Keys of the recipe with other values, such as learning_rate=1e-5.",
    )
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Train, and return the exit status: STOPPED after a signal, when a checkpoint was written."""
    from fusion_hf.training.recipe import check_files, load_recipe

    values = load_recipe(arguments.recipe, arguments.overrides)
    check_files(values)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    from fusion_hf.training import run as training

    if training.run(values):
        return 0
    sys.stderr.write("A signal stopped the run after a checkpoint was written. Run the same command to resume.\n")
    return STOPPED
