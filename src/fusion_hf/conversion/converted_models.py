"""Cache of converted checkpoints. Each of the authors' checkpoints is converted once into the Hugging Face cache.

The folder's name contains the commit of the repository, or a digest of the local files, so a checkpoint that changes
is converted again. Nothing large is imported before something is converted.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fusion_hf.common.errors import InputError
from fusion_hf.conversion.inputs import (
    ConversionOptions,
    find_conversion_inputs,
    find_named_tower,
    local_revision,
)
from fusion_hf.conversion.model_files import ConversionError, read_json
from fusion_hf.hub.folders import REVISION_MARK, HubOptions

LIBRARY, NAMESPACE = "fusion_hf", "converted"  # in the assets of the Hugging Face cache
LAYOUT = 1  # increased when conversion writes something else than before
LOCAL = "local"
DIGITS = 16  # length of a digest
UNFINISHED, LOCK = ".*.tmp", ".lock"


@dataclass(frozen=True)
class ConvertedModel:
    """
    A converted checkpoint in the cache.

    Attributes:
        name: Name of the repository or the folder.
        revision: Commit of the repository, or a digest of the folder's files.
        folder: The model folder.
    """

    name: str
    revision: str
    folder: Path

    @property
    def num_bytes(self) -> int:
        """Size on disk in bytes."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def remove(self) -> None:
        """Remove the model from the disk, with the incomplete files that killed processes left beside it."""
        shutil.rmtree(self.folder.parent)


def convert_once(name: str, folder: Path, hub: HubOptions) -> Path:
    """
    Return the model folder of a checkpoint, and convert the checkpoint if the folder does not exist yet.

    If several processes call this at the same time, one of them converts.

    Args:
        name: A folder or a repository of the Hub.
        folder: Folder with `config.json`: the checkpoint itself, or the cached files of one commit.
        hub: Options for requests to the Hub.

    Returns:
        The model folder.

    Raises:
        ConversionError: If the checkpoint cannot be converted. Nothing is left behind then.
    """
    place = _place(name, folder)
    if place.is_dir():
        return place
    is_local = Path(name).expanduser().is_dir()
    source = str(folder) if is_local else f"{name}{REVISION_MARK}{local_revision(folder)}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent.with_name(place.parent.name + LOCK)):
            if not place.is_dir():  # no other process has converted it meanwhile
                for rest in place.parent.glob(UNFINISHED):  # left by a process that was killed
                    shutil.rmtree(rest, ignore_errors=True)
                options = ConversionOptions(checkpoint=source, output=place, hub=hub)
                inputs = find_conversion_inputs(options)
                from fusion_hf.conversion.from_authors import convert  # imports torch

                convert(options, inputs)
    except InputError as error:
        raise ConversionError(
            f"The model {name} is a checkpoint of the authors' code, and could not be converted: {error} You can pass "
            "options to `fusion-hf convert`."
        ) from error
    except OSError as error:
        raise ConversionError(f"The model {name} cannot be converted into {place}: {error}.") from error
    return place


def converted_models() -> list[ConvertedModel]:
    """Return the converted models in the cache, sorted by name."""
    models = []
    for folder in sorted(cache_folder().glob("*/*/*")):
        if folder.is_dir() and not folder.match(UNFINISHED):
            owner, _, name = folder.parent.parent.name.partition("--")
            full = name if owner == LOCAL else f"{owner}/{name}"
            models.append(ConvertedModel(full, folder.parent.name, folder))
    return models


def cache_folder() -> Path:
    """Return the folder of converted checkpoints, which has a folder for each name."""
    from huggingface_hub import cached_assets_path  # importing it takes half a second

    return Path(cached_assets_path(LIBRARY, NAMESPACE, "models"))


def _place(name: str, folder: Path) -> Path:
    """Return the path of a checkpoint's model folder, which may not exist yet."""
    commit = None if Path(name).expanduser().is_dir() else local_revision(folder)
    parts: list[object] = [LAYOUT, commit or _describe_files(folder)]
    tower = find_named_tower(read_json(folder / "config.json"))
    if tower is not None:
        parts.append(_describe_files(tower.path))
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:DIGITS]
    short = name.rpartition("/")[2] if commit else folder.resolve().name
    owner = name.rpartition("/")[0] if commit else LOCAL
    revision = digest if commit is None else f"{commit}-{digest}"
    return cache_folder() / f"{owner}--{short}" / revision / short


def _describe_files(folder: Path) -> list[object]:
    """Return a value that changes when a folder's files change."""
    files = sorted(path for path in folder.resolve().iterdir() if path.is_file())
    return [str(folder.resolve()), [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]]
