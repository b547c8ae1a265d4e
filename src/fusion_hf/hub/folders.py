"""Model folders by their name: on disk, or on the Hub, from where they are fetched. Imports nothing heavy."""

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
AUTHORS_PREFIX = "fusion_"  # of the model types in the authors' checkpoints
CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# what tells a training run's folder, and that its model is there
RECIPE_FILE, FINISHED_FILE = "recipe.yaml", "finished.json"
MAX_CONFIG_BYTES = 2**20
# a folder of the Hub without its code, which is not needed, and without weights in formats that can hold code
HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "README.md")  # the card names the licence
IN_FOLDERS = "*/*"
PART = r"\w(?:[\w.-]*\w)?"
REPOSITORY = re.compile(rf"{PART}(?:/{PART})?", re.ASCII)  # what the Hub's own rules allow, and a little more
REVISION_MARK = "@"  # between a repository and its revision, as in the Hub's own `hf://` addresses


@dataclass(frozen=True)
class HubOptions:
    """How the Hub is asked, as `from_pretrained` takes it; the defaults are the Hub client's."""

    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False


DEFAULT_HUB = HubOptions()
# name, folder with its `config.json`, how the Hub is asked -> model folder
Converter = Callable[[str, Path, HubOptions], Path]
_converters: list[Converter] = []


def convert_with(converter: Converter) -> None:
    """Say what makes a model folder of an authors' checkpoint: the package does, since that is on a floor above."""
    _converters[:] = [converter]


def convert_checkpoint(name: str, folder: Path, hub: HubOptions = DEFAULT_HUB) -> Path:
    """The model folder that an authors' checkpoint becomes; made only once.

    Args:
        name: a folder or a repository of the Hub.
        folder: holds its `config.json`: the folder itself, or what is in the cache of one commit.
        hub: how the Hub is asked for the rest.

    Raises:
        InputError: if the checkpoint is unknown, damaged or incomplete.
    """
    (convert,) = _converters
    return convert(name, folder, hub)


def nano_path() -> str:
    """Folder of the bundled `fusion-nano`, as every `from_pretrained` takes it."""
    return str(resources.files("fusion_hf") / NANO)


def find_folder(name: str, revision: str | None = None) -> Path:
    """Find the folder called `name`, or a repository of the Hub, downloaded; its configuration is FUSION's.

    A checkpoint of the authors is converted, once.

    Args:
        name: a folder, a repository, or a repository, `@` and a revision.
        revision: of a repository, if its name says none.

    Raises:
        InputError: if there is no such model, or it is no FUSION.
    """
    folder = Path(name).expanduser()
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError):  # longer than a name can be, or with a null character
        is_folder = exists = False
    if is_folder:
        return convert_checkpoint(name, folder) if _is_authors(folder, name) else folder
    if exists:
        raise InputError(f"The model {name} is a file; allowed: the folder that holds it, or a repository of the Hub.")
    repository, named = split_revision(name)
    if not REPOSITORY.fullmatch(repository):
        raise _impossible(name)
    revision = named or revision
    found = _download(repository, revision, (CONFIG,))
    if _is_authors(found, name):  # before gigabytes of another model come
        return convert_checkpoint(repository, found)
    return _download(repository, revision, HUB_FILES)


def split_revision(name: str) -> tuple[str, str | None]:
    """A repository and its revision, if `name` has one behind `@`."""
    repository, mark, revision = name.partition(REVISION_MARK)
    return repository, revision if mark else None


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    # half a second, which a folder on disk does not need
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
            f"The model {shown} is no folder, and the Hub cannot be reached: check the name or the network."
        ) from error
    except (OSError, HTTPError) as error:
        raise InputError(f"The model {shown} is no folder, and cannot be fetched from the Hub: {error}") from error


def _impossible(name: str) -> InputError:
    return InputError(f"The model {short_name(name)} is no folder, and no repository of the Hub can have that name.")


def read_config(path: Path) -> dict[str, Any]:
    """
    Read a model's configuration, unchecked.

    Raises:
        InputError: if the file holds none.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_CONFIG_BYTES else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON, or of more than {MAX_CONFIG_BYTES} bytes: {error}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; allowed: an object.")
    return values


def read_adapter(folder: Path) -> dict[str, Any]:
    """Read what an adapter's configuration says, unchecked.

    Raises:
        InputError: if `folder` holds none.
    """
    path = folder / ADAPTER_CONFIG
    try:
        content = read_config(path)
    except InputError as error:
        raise InputError(f"{error} Give the output_dir of a LoRA run, or copy the adapter again.") from error
    if content.get("peft_type") != "LORA":
        raise InputError(f"{path} describes no LoRA; give the output_dir of a LoRA run.")
    return content


def base_of(adapter: Path, given: str | None = None) -> str:
    """
    Return the model that an adapter belongs to: the one given, or the one that the adapter names.

    Raises:
        InputError: if there is no adapter, or none is named.
    """
    named = read_adapter(adapter).get("base_model_name_or_path")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{adapter / ADAPTER_WEIGHTS} is missing; adapters are read from safetensors only.")
    base = named if given is None else given
    if not isinstance(base, str) or not base:
        raise InputError(f"The adapter {adapter} names no base; give it with --base.")
    return base


def is_authors_type(values: dict[str, Any]) -> bool:
    """Whether a configuration's model type is one of the authors' code, known to conversion or not."""
    return str(values.get("model_type")).startswith(AUTHORS_PREFIX)


def _is_authors(folder: Path, name: str) -> bool:
    """Whether a folder is a checkpoint of the authors' code rather than a model folder.

    Raises:
        InputError: if it is neither.
    """
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            advice = f"fusion-hf merge --model {name} --output NEW_DIR"
            raise InputError(f"The model {name} is a LoRA adapter: make a model of it and its base, with {advice}.")
        raise InputError(
            f"The model {name} has no config.json; allowed: a model folder, as save_pretrained writes it."
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
        raise InputError(f"The model {name} is a {shown} model; allowed: {MODEL_TYPE!r}.")
    return False
