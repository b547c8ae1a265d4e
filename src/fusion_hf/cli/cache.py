"""`fusion-hf cache`: the authors' checkpoints that were converted when they were loaded by their names."""

import argparse
import sys
from pathlib import Path

from fusion_hf.cli.terminal import printable
from fusion_hf.common.errors import InputError, short_name
from fusion_hf.conversion.converted_models import ConvertedModel, cache_folder, converted_models

GIGABYTE = 10**9


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Tell the command line about `cache`."""
    parser = commands.add_parser(
        "cache",
        help="list or remove the authors' checkpoints that were converted by their names",
        description="List the authors' checkpoints that other commands and from_pretrained have converted into the "
        "Hugging Face cache: name, size, revision and folder. What is removed is converted again when it is needed.",
    )
    parser.add_argument("--remove", metavar="NAME", help="remove all conversions of this repository or folder")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(arguments: argparse.Namespace) -> int:
    """List or remove; returns the exit status."""
    models = converted_models()
    if arguments.remove is None:
        lines = [_line(model) for model in models] or [f"There are no converted checkpoints in {cache_folder()}."]
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return 0
    folder = Path(arguments.remove)
    name = folder.resolve().name if folder.is_dir() else arguments.remove
    chosen = [model for model in models if name in (model.name, model.folder.name)]
    if not chosen:
        known = ", ".join(sorted({model.name for model in models})) or "none"
        raise InputError(f"--remove is {short_name(arguments.remove)!r}; converted checkpoints: {known}.")
    for model in chosen:
        line = _line(model)
        model.remove()
        sys.stdout.write(f"removed {line}\n")
    return 0


def _line(model: ConvertedModel) -> str:
    return printable(f"{model.name}  {model.num_bytes / GIGABYTE:.3f} GB  {model.revision}  {model.folder}")
