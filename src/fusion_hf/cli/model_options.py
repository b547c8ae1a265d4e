"""The options of commands that ask a model, and the model that they name; imports nothing heavy before it must."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fusion_hf.cli.argument_types import AUTO, DTYPES, device, positive, square
from fusion_hf.cli.parser import Parser
from fusion_hf.hub.folders import find_folder, nano_path

Options = TypeVar("Options")
DEBUG = "--debug"
MAX_NEW_TOKENS = 1024


def budget_options() -> Parser:
    """Make a parser for `parents`: a model, and the tokens that it spends on an image."""
    shared = Parser(add_help=False)
    shared.add_argument(
        "--model", metavar="DIR_OR_REPO", help="a model folder or a Hub repository; default: the bundled fusion-nano"
    )
    shared.add_argument(
        "--query-len",
        type=square,
        metavar="N",
        help="latent tokens per question, a perfect square: more of them look more closely; default: the model's",
    )
    shared.add_argument(
        "--image-token-grid",
        type=positive,
        metavar="N",
        help="side of the grid of image tokens: a smaller one is faster and sees less; default: the model's",
    )
    return shared


def model_options(max_new_tokens: int = MAX_NEW_TOKENS) -> Parser:
    """
    Make a parser for `parents`: whatever asks a model.

    Args:
        max_new_tokens: the default of that option.
    """
    shared = Parser(add_help=False, parents=[budget_options()])
    shared.add_argument(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help="longest answer; default: %(default)s",
    )
    shared.add_argument(
        "--device",
        type=device,
        default=AUTO,
        help="cpu, cuda, cuda:1, mps or auto (default: cuda, else mps, else cpu)",
    )
    shared.add_argument(
        "--dtype",
        choices=DTYPES,
        default=AUTO,
        help="type of the weights; auto (the default) is bfloat16 on cuda, and on a CPU that is faster in it for "
        "models saved in it; else float32",
    )
    shared.add_argument(DEBUG, action="store_true", help="show where an error comes from, and the libraries' notes")
    return shared


def find_model(arguments: argparse.Namespace) -> str:
    """
    Find the folder of the model that `--model` names, fetched if it is on the Hub.

    Raises:
        InputError: if there is no such FUSION.
    """
    name = nano_path() if arguments.model is None else arguments.model
    if not arguments.debug and not Path(name).is_dir():
        silence_hub()
    return str(find_folder(name))


def answer_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what an answer depends on beside the model."""
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "query_len", "image_token_grid")}


def silence_hub() -> None:
    """No advice of the Hub's client; downloads keep their bars."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()


def make_options(kind: type[Options], arguments: argparse.Namespace) -> Options:
    """Make a dataclass of options, from the arguments that are named as its fields."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(arguments).items() if name in names})
