"""`fusion-hf cache`: the authors' checkpoints that were converted when they were loaded by their names."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fusion_hf.cli.model_options import DEBUG, DEBUG_HELP, JSON_HELP
from fusion_hf.cli.terminal import printable
from fusion_hf.common.errors import InputError, short_name
from fusion_hf.common.outputs import json_bytes
from fusion_hf.conversion.converted_models import ConvertedModel, cache_folder, converted_models

GIGABYTE = 10**9


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `cache` to the subparsers of `fusion-hf`."""
    parser = commands.add_parser(
        "cache",
        help="List or remove converted checkpoints.",
        description="List the authors' checkpoints that were converted into the Hugging Face cache when a command or "
        "`from_pretrained` loaded them: name, size, revision and folder. A checkpoint that was removed is converted "
        "again when it is needed.",
        examples=("fusion-hf cache", "fusion-hf cache --remove starriver030515/FUSION-Phi3.5-3B"),
    )
    parser.add_argument("--remove", metavar="NAME", help="Remove all conversions of this repository or folder.")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)


def run(arguments: argparse.Namespace) -> int:
    """List or remove checkpoints, and return the exit status."""
    models = converted_models()
    if arguments.remove is None:
        lines = [_line(model) for model in models] or [f"There are no converted checkpoints in {cache_folder()}."]
        text = "".join(f"{line}\n" for line in lines)
        sys.stdout.write(_as_json("models", models) if arguments.json else text)
        return 0
    folder = Path(arguments.remove)
    name = folder.resolve().name if folder.is_dir() else arguments.remove
    chosen = [model for model in models if name in (model.name, model.folder.name)]
    if not chosen:
        known = ", ".join(sorted({model.name for model in models})) or "none"
        raise InputError(f"`--remove` must be a converted checkpoint ({known}), got {short_name(arguments.remove)!r}.")
    text = "".join(f"Removed {_line(model)}\n" for model in chosen)
    if arguments.json:
        text = _as_json("removed", chosen)
    for model in chosen:
        model.remove()
    sys.stdout.write(text)
    return 0


def _as_json(key: str, models: Sequence[ConvertedModel]) -> str:
    content = [{**asdict(model), "folder": str(model.folder), "num_bytes": model.num_bytes} for model in models]
    return json_bytes({"cache": str(cache_folder()), key: content}, indent=2).decode()


def _line(model: ConvertedModel) -> str:
    return printable(f"{model.name}  {model.num_bytes / GIGABYTE:.3f} GB  {model.revision}  {model.folder}")
