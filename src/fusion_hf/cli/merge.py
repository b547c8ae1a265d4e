"""`fusion-hf merge`: one model folder of a LoRA adapter and its base."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP
from fusion_hf.cli.terminal import printable, wrote
from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_output
from fusion_hf.common.user_values import DTYPE_NAMES
from fusion_hf.hub.folders import base_of, find_folder


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `merge` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "merge",
        help="Merge a LoRA adapter with its base model.",
        description="Merge a LoRA adapter with its base model and write a complete model folder. Requires the extra "
        "`train`.",
        examples=("fusion-hf merge --model runs/lora --output my-model",),
    )
    parser.add_argument(
        "--model",
        dest="adapter",
        required=True,
        metavar="ADAPTER_DIR",
        help="The adapter: the output_dir of a LoRA run.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="The folder to write, which must not exist.")
    parser.add_argument(
        "--base", metavar="DIR_OR_REPO", help="The base model (default: the one that the adapter names)."
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default=DTYPE_NAMES[0],
        help="Data type of the written weights (default: %(default)s).",
    )
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Merge, and return the exit status."""
    adapter, output = Path(arguments.adapter), Path(arguments.output)
    if not adapter.is_dir():
        raise InputError(f"`--model` must be the output_dir of a LoRA run, got {adapter}, which is no folder.")
    base = base_of(adapter, arguments.base)
    require(("peft",), "Merging", "train")
    check_output(output)
    find_folder(base)
    if not arguments.debug:
        from fusion_hf.cli.model_loading import silence_libraries

        silence_libraries(bars=sys.stderr.isatty())
    from fusion_hf.training.adapters import merge

    merge(adapter, output, base, arguments.dtype)
    sys.stdout.write(printable(f"Merged {adapter} with its base {base}, as {arguments.dtype}. {wrote(output)}\n"))
    return 0
