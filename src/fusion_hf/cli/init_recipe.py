"""`fusion-hf init-recipe`: a commented recipe for own records."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.terminal import printable
from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_new_file
from fusion_hf.hub.folders import REPOSITORY, find_folder, nano_path

METHODS = ("lora", "qlora", "full")
SUFFIXES = (".yaml", ".yml")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `init-recipe`."""
    parser = commands.add_parser(
        "init-recipe",
        help="write a commented recipe for your own records",
        description="Look at records and write a recipe for them, with comments, that fusion-hf train runs as it is. "
        "The last tenth of a file, at most 500 records, is held out and measured.",
    )
    parser.add_argument("data", metavar="DATA", help="records: a file or folder, a Hub data set, or a mixture (.yaml)")
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="qlora keeps the model in 4 bits; default: %(default)s"
    )
    parser.add_argument(
        "--model", metavar="DIR_OR_REPO", help="what to start from; default: the bundled fusion-nano, to try it"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("recipe.yaml"), metavar="FILE", help="a new file; default: %(default)s"
    )
    parser.add_argument(
        "--data-root", metavar="DIR", help="that relative paths of DATA are under; default: the folder of the file"
    )
    parser.add_argument("--eval-data", metavar="DATA", help="held-out records; default: the last ones of DATA")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Write it; returns the exit status."""
    require(("datasets", "pyarrow", "accelerate"), "A training", "train")
    output: Path = arguments.output
    if output.suffix not in SUFFIXES:
        raise InputError(f"--output is {output}; allowed: a name that ends in {' or '.join(SUFFIXES)}.")
    check_new_file(output, "--output")
    if output.exists():
        raise InputError(f"--output: {output} exists; give another one, or remove it.")
    model = nano_path() if arguments.model is None else arguments.model
    if Path(model).expanduser().exists() or not REPOSITORY.fullmatch(model):
        find_folder(model)  # one of the Hub is fetched by the training
    from fusion_hf.data.mixture import read_entries

    for source, root in ((arguments.data, arguments.data_root), (arguments.eval_data, None)):
        for entry in read_entries(source, root) if source is not None else ():
            entry.locate()
    from fusion_hf.training.recipe_writing import RecipeRequest, write_recipe

    request = RecipeRequest(arguments.data, output, arguments.method, model, arguments.data_root, arguments.eval_data)
    written = write_recipe(request)
    steps = written.steps
    sys.stdout.write(
        printable(
            f"Wrote {', '.join(map(str, written.files))}: {steps.records:,} records to train on, "
            f"{written.held_out:,} held out; {steps.per_epoch:,} steps per epoch, {steps.total:,} in all. "
            f"Start it: fusion-hf train {output}\n"
        )
    )
    return 0
