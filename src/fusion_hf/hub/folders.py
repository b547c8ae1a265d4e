"""Finding model folders by name, on disk or on the Hub. This module imports nothing large."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError, short_name

NANO = "checkpoints/fusion-nano"
MODEL_TYPE = "fusion"
AUTHORS_PREFIX = "fusion_"  # prefix of the model types in the authors' checkpoints
CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# files that mark the folder of a training run, and a run whose model is complete
RECIPE_FILE, FINISHED_FILE = "recipe.yaml", "finished.json"
MAX_CONFIG_BYTES = 2**20
# files of a model on the Hub, without code, which is not needed, and without weight formats that can contain code
HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "README.md")  # the card names the licence
IN_FOLDERS = "*/*"
PART = r"\w(?:[\w.-]*\w)?"
REPOSITORY = re.compile(rf"{PART}(?:/{PART})?", re.ASCII)  # the Hub's own rules, and a few more names
REVISION_MARK = "@"  # between a repository and its revision, as in `hf://` URLs


@dataclass(frozen=True)
class HubOptions:
    """Options for requests to the Hub, as in `from_pretrained`. The defaults are those of the Hub client."""

    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False


DEFAULT_HUB = HubOptions()
# (name, folder with `config.json`, options for the Hub) -> model folder
Converter = Callable[[str, Path, HubOptions], Path]
_converters: list[Converter] = []


def convert_with(converter: Converter) -> None:
    """Set the function that converts the authors' checkpoints. The package sets it, because this module must not."""
    _converters[:] = [converter]


def convert_checkpoint(name: str, folder: Path, hub: HubOptions = DEFAULT_HUB) -> Path:
    """
    Return the model folder of one of the authors' checkpoints, which is converted only once.

    Args:
        name: A folder or a repository of the Hub.
        folder: Folder with `config.json`: the checkpoint itself, or the cached files of one commit.
        hub: Options for requests to the Hub.

    Raises:
        InputError: If the checkpoint is unknown, damaged or incomplete.
    """
    (convert,) = _converters
    return convert(name, folder, hub)


def nano_path() -> str:
    """
    Return the folder of the bundled model `fusion-nano`, which every `from_pretrained` accepts.

    Returns:
        The path of the folder.
    """
    return str(resources.files("fusion_hf") / NANO)


def find_folder(name: str, revision: str | None = None) -> Path:
    """
    Find a model folder, or download a repository of the Hub. One of the authors' checkpoints is converted, once.

    Args:
        name: A folder, a repository, or a repository with `@` and a revision.
        revision: Revision of a repository, if its name has none.

    Returns:
        The model folder, whose configuration is FUSION's.

    Raises:
        InputError: If there is no such model, or if it is not a FUSION model.
    """
    folder = Path(name).expanduser()
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError):  # the name is too long or contains a null character
        is_folder = exists = False
    if is_folder:
        return convert_checkpoint(name, folder) if _is_authors(folder, name) else folder
    if exists:
        raise InputError(f"A model must be a folder or a repository of the Hub, got the file {name}.")
    repository, named = split_revision(name)
    if not REPOSITORY.fullmatch(repository):
        raise _impossible(name)
    revision = named or revision
    found = _download(repository, revision, (CONFIG,))
    if _is_authors(found, name):  # before the gigabytes of another model are downloaded
        return convert_checkpoint(repository, found)
    return _download(repository, revision, HUB_FILES)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split a name into a repository and its revision, which is None if there is no `@`."""
    repository, mark, revision = name.partition(REVISION_MARK)
    return repository, revision if mark else None


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    # this import takes half a second, which a folder on disk does not need
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    shown = name if revision is None else f"{name}{REVISION_MARK}{revision}"
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=[IN_FOLDERS])
        )
    except HFValidationError as error:
        raise _impossible(name) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"The model {shown} is not a folder, and the Hub cannot be reached. Check the name or the network."
        ) from error
    except (OSError, HTTPError) as error:
        raise InputError(f"The model {shown} is not a folder, and cannot be fetched from the Hub: {error}") from error


def _impossible(name: str) -> InputError:
    return InputError(f"The model {short_name(name)} is neither a folder nor a valid name of a Hub repository.")


def read_config(path: Path) -> dict[str, Any]:
    """
    Read a model's configuration without checking it.

    Args:
        path: Path of the file.

    Raises:
        InputError: If the file does not contain a JSON object.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_CONFIG_BYTES else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON of at most {MAX_CONFIG_BYTES} bytes: {error}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must contain a JSON object, got a {type(values).__name__}.")
    return values


def read_adapter(folder: Path) -> dict[str, Any]:
    """
    Read an adapter's configuration without checking it.

    Args:
        folder: Folder of the adapter.

    Raises:
        InputError: If the folder does not contain a LoRA adapter.
    """
    path = folder / ADAPTER_CONFIG
    try:
        content = read_config(path)
    except InputError as error:
        raise InputError(f"{error} Pass the output_dir of a LoRA run, or copy the adapter again.") from error
    if content.get("peft_type") != "LORA":
        raise InputError(f"{path} does not describe a LoRA adapter. Pass the output_dir of a LoRA run.")
    return content


def base_of(adapter: Path, given: str | None = None) -> str:
    """
    Return the base model of an adapter.

    Args:
        adapter: Folder of the adapter.
        given: The base model. Defaults to the one that the adapter names.

    Raises:
        InputError: If there is no adapter, or if no base model is known.
    """
    named = read_adapter(adapter).get("base_model_name_or_path")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{adapter / ADAPTER_WEIGHTS} is missing. Adapters are read only from safetensors.")
    base = named if given is None else given
    if not isinstance(base, str) or not base:
        raise InputError(f"The adapter {adapter} does not name its base model. Pass it as --base.")
    return base


def is_authors_type(values: dict[str, Any]) -> bool:
    """Return whether a configuration's model type belongs to the authors' code, even an unknown one."""
    return str(values.get("model_type")).startswith(AUTHORS_PREFIX)


def _is_authors(folder: Path, name: str) -> bool:
    """
    Return whether a folder is one of the authors' checkpoints instead of a model folder.

    Raises:
        InputError: If it is neither.
    """
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            advice = f"fusion-hf merge --model {name} --output NEW_DIR"
            raise InputError(f"The model {name} is a LoRA adapter. Merge it with its base model first: {advice}.")
        raise InputError(
            f"The model {name} must be a folder as `save_pretrained` writes it, but it has no config.json."
        )
    try:
        values = read_config(folder / CONFIG)
    except InputError as error:
        raise InputError(f"The model {name} has an unreadable config.json: {error}") from error
    if is_authors_type(values):
        return True
    model_type = values.get("model_type")
    if model_type != MODEL_TYPE:
        shown = short_name(repr(model_type))
        raise InputError(f"The model type of {name} must be {MODEL_TYPE!r}, got {shown}.")
    return False
