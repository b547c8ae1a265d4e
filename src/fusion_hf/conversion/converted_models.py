"""The authors' checkpoints by their names: each is converted once into the Hugging Face cache, and found there again.

A place is named after what it was made from: the commit of a repository, or the files of a folder. So a checkpoint
that changes is converted anew. Imports nothing heavy before something is to be converted.
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

LIBRARY, NAMESPACE = "fusion_hf", "converted"  # below the assets of the Hugging Face cache
LAYOUT = 1  # changes when conversion writes something else than before
LOCAL = "local"
DIGITS = 16  # of a digest
UNFINISHED, LOCK = ".*.tmp", ".lock"


@dataclass(frozen=True)
class ConvertedModel:
    """A converted checkpoint in the cache.

    Attributes:
        name: of the repository, or of the folder.
        revision: commit of the repository, or a digest of the folder's files.
        folder: the model folder.
    """

    name: str
    revision: str
    folder: Path

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def remove(self) -> None:
        """Remove it from the disk, with what killed processes left beside it."""
        shutil.rmtree(self.folder.parent)


def convert_once(name: str, folder: Path, hub: HubOptions) -> Path:
    """The model folder of a checkpoint, which is made if it is not there yet. Of several processes, one makes it.

    Args:
        name: a folder or a repository of the Hub.
        folder: holds its `config.json`: the folder itself, or what is in the cache of one commit.
        hub: how the Hub is asked for the rest.

    Raises:
        ConversionError: if it cannot be converted; nothing is left behind then.
    """
    place = _place(name, folder)
    if place.is_dir():
        return place
    is_local = Path(name).expanduser().is_dir()
    source = str(folder) if is_local else f"{name}{REVISION_MARK}{local_revision(folder)}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent.with_name(place.parent.name + LOCK)):
            if not place.is_dir():  # nobody else has made it meanwhile
                for rest in place.parent.glob(UNFINISHED):  # of a process that was killed
                    shutil.rmtree(rest, ignore_errors=True)
                options = ConversionOptions(checkpoint=source, output=place, hub=hub)
                inputs = find_conversion_inputs(options)
                from fusion_hf.conversion.from_authors import convert  # imports torch

                convert(options, inputs)
    except InputError as error:
        raise ConversionError(
            f"The model {name} is a checkpoint of the authors' code that cannot be converted as it is: {error} "
            "Options are those of fusion-hf convert."
        ) from error
    except OSError as error:
        raise ConversionError(f"The model {name} cannot be converted into {place}: {error}.") from error
    return place


def converted_models() -> list[ConvertedModel]:
    """What is in the cache, by name."""
    models = []
    for folder in sorted(cache_folder().glob("*/*/*")):
        if folder.is_dir() and not folder.match(UNFINISHED):
            owner, _, name = folder.parent.parent.name.partition("--")
            full = name if owner == LOCAL else f"{owner}/{name}"
            models.append(ConvertedModel(full, folder.parent.name, folder))
    return models


def cache_folder() -> Path:
    """Where converted checkpoints are, in a folder for each name."""
    from huggingface_hub import cached_assets_path  # half a second

    return Path(cached_assets_path(LIBRARY, NAMESPACE, "models"))


def _place(name: str, folder: Path) -> Path:
    """Where the model folder of a checkpoint is, or will be."""
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
    """What changes when a folder's files do."""
    files = sorted(path for path in folder.resolve().iterdir() if path.is_file())
    return [str(folder.resolve()), [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]]
