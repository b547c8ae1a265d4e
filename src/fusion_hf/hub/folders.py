"""Model folders by their name: on disk, or on the Hub, from where they are fetched. Imports nothing heavy."""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError, short_name

NANO = "checkpoints/fusion-nano"
MODEL_TYPE = "fusion"
AUTHORS_MODEL_TYPES = ("fusion_phi", "fusion_llama")
CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 2**20
# a folder of the Hub without its code, which is not needed, and without weights in formats that can hold code
HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
IN_FOLDERS = "*/*"
PART = r"\w(?:[\w.-]*\w)?"
REPOSITORY = re.compile(rf"{PART}(?:/{PART})?", re.ASCII)  # what the Hub's own rules allow, and a little more


def nano_path() -> str:
    """Folder of the bundled `fusion-nano`, as every `from_pretrained` takes it."""
    return str(resources.files("fusion_hf") / NANO)


def find_folder(name: str) -> Path:
    """Find the folder called `name`, or a repository of the Hub, downloaded; its configuration is FUSION's.

    Raises:
        InputError: if there is no such model, or it is no FUSION.
    """
    folder = Path(name).expanduser()
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError):  # longer than a name can be, or with a null character
        is_folder = exists = False
    if is_folder:
        _check_model_type(folder, name)
        return folder
    if exists:
        raise InputError(f"The model {name} is a file; allowed: the folder that holds it, or a repository of the Hub.")
    if not REPOSITORY.fullmatch(name):
        raise _impossible(name)
    _check_model_type(_download(name, (CONFIG,)), name)  # before gigabytes of another model come
    return _download(name, HUB_FILES)


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    # half a second, which a folder on disk does not need
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=[IN_FOLDERS]))
    except HFValidationError as error:
        raise _impossible(name) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"The model {name} is no folder, and the Hub cannot be reached: check the name or the network."
        ) from error
    except (OSError, HTTPError) as error:
        raise InputError(f"The model {name} is no folder, and cannot be fetched from the Hub: {error}") from error


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


def _check_model_type(folder: Path, name: str) -> None:
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            advice = f"fusion-hf merge {name} --output NEW_DIR"
            raise InputError(f"The model {name} is a LoRA adapter: make a model of it and its base, with {advice}.")
        raise InputError(
            f"The model {name} has no config.json; allowed: a model folder, as save_pretrained writes it."
        )
    try:
        model_type = read_config(folder / CONFIG).get("model_type")
    except InputError as error:
        raise InputError(f"The model {name} has an unreadable config.json: {error}") from error
    if model_type in AUTHORS_MODEL_TYPES:
        raise InputError(f"The model {name} is a checkpoint of the authors' code: convert it with fusion-hf convert.")
    if model_type != MODEL_TYPE:
        shown = short_name(repr(model_type))
        raise InputError(f"The model {name} is a {shown} model; allowed: {MODEL_TYPE!r}.")
