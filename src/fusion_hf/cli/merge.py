"""`fusion-hf merge`: a LoRA adapter and its base become one model folder."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.terminal import printable, wrote
from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require
from fusion_hf.common.outputs import check_output
from fusion_hf.common.user_values import DTYPE_NAMES
from fusion_hf.hub.folders import base_of, find_folder


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `merge`."""
    parser = commands.add_parser(
        "merge",
        help="put a LoRA adapter into its base: a complete model folder",
        description="Add what a LoRA run trained to the model that it started from: a complete model folder.",
    )
    parser.add_argument(
        "--model", dest="adapter", required=True, metavar="ADAPTER_DIR", help="the output_dir of a LoRA run"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--base", metavar="DIR_OR_REPO", help="default: the model that the adapter names")
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default=DTYPE_NAMES[0],
        help="type of the written weights; default: %(default)s",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """Merge; returns the exit status."""
    adapter, output = Path(arguments.adapter), Path(arguments.output)
    if not adapter.is_dir():
        raise InputError(f"{adapter} is no folder; give the output_dir of a LoRA run.")
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
