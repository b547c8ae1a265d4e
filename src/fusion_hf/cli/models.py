"""The model that a command line names, found before torch is imported. Imports nothing heavy before it must."""

import argparse
from pathlib import Path

from fusion_hf.hub.folders import find_folder, nano_path


def find_model(arguments: argparse.Namespace) -> str:
    """
    The folder of the model that `--model` names, fetched if it is on the Hub.

    Raises:
        InputError: if there is no such FUSION.
    """
    name = nano_path() if arguments.model is None else arguments.model
    if not arguments.debug and not Path(name).is_dir():
        silence_hub()
    return str(find_folder(name))


def silence_hub() -> None:
    """No advice of the Hub's client; downloads keep their bars."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
