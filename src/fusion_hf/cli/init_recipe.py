"""`fusion-hf init-recipe`: write a commented recipe for your own records."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP
from fusion_hf.cli.terminal import printable
from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_new_file
from fusion_hf.hub.folders import REPOSITORY, find_folder, nano_path

METHODS = ("lora", "qlora", "full")
SUFFIXES = (".yaml", ".yml")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `init-recipe` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "init-recipe",
        help="Write a training recipe for your own records.",
        description="Read your records and write a commented recipe that `fusion-hf train` runs unchanged. The last "
        "tenth of a file, at most 500 records, is held out for evaluation. Requires the extra `train`.",
        examples=(
            "fusion-hf init-recipe records.json",
            "fusion-hf init-recipe records.json --model DIR_OR_REPO --method qlora --output recipe.yaml",
        ),
    )
    parser.add_argument(
        "data", metavar="DATA", help="The records: a file, a folder, a Hub dataset, or a mixture (.yaml)."
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="What to train: LoRA adapters (lora), LoRA adapters on a model in 4 bits (qlora), or all weights (full) "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--model", metavar="DIR_OR_REPO", help="The model to start from (default: the bundled fusion-nano)."
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("recipe.yaml"),
        metavar="FILE",
        help="The recipe to write (default: %(default)s).",
    )
    parser.add_argument(
        "--data-root", metavar="DIR", help="The folder of relative paths in DATA (default: the folder of the file)."
    )
    parser.add_argument("--eval-data", metavar="DATA", help="Records to evaluate on (default: the last ones of DATA).")
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Write the recipe, and return the exit status."""
    require(("datasets", "pyarrow", "accelerate"), "A training", "train")
    output: Path = arguments.output
    if output.suffix not in SUFFIXES:
        raise InputError(f"`--output` must end in {' or '.join(SUFFIXES)}, got {output}.")
    check_new_file(output, "--output")
    if output.exists():
        raise InputError(f"`--output` must be a new file, got {output}, which exists.")
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
