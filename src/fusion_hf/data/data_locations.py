"""Find out what a name refers to, a file, a folder or a data set of the Hub, by its suffix and its content."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.data.record_parsing import FILE_NAME, IMAGE_KEY
from fusion_hf.data.sources import JsonArray, JsonLines, RecordSource, RecordStream
from fusion_hf.data.tar_shards import TarRecords, find_shards

FILE_SOURCES: dict[str, type[JsonArray | JsonLines | TarRecords]] = {
    ".json": JsonArray,
    ".jsonl": JsonLines,
    ".tar": TarRecords,
}
SUFFIXES = (*FILE_SOURCES, ".parquet", ".csv")
SAVED = "state.json"  # in a folder written by `Dataset.save_to_disk`
SAVED_SPLITS = "dataset_dict.json"  # in a folder written by `DatasetDict.save_to_disk`, next to one folder per split
METADATA = ("metadata.jsonl", "metadata.csv")
HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<split>\w+))?")
DEFAULT_SPLIT = "train"
TABLES_FOLDER = "tables"  # folder in the cache for Parquet and CSV files converted to Arrow


@dataclass(frozen=True)
class DataLocation:
    """
    Existing files of one kind, or a data set of the Hub.

    Attributes:
        files: the paths of the files.
        root: the folder that image paths are relative to.
        image_key: the field that holds the image.
        hub: the repository and the split of a data set on the Hub.
        saved: the folder of a saved data set.
    """

    files: tuple[Path, ...]
    root: Path
    image_key: str = IMAGE_KEY
    hub: tuple[str, str] | None = None  # repository and split
    saved: Path | None = None  # the folder of a saved data set

    def sources(self, cache: Path) -> list[RecordSource]:
        """
        Open the data with random access. Parquet and CSV files are converted to Arrow for this.

        Args:
            cache: the folder for converted files.
        """
        if self._has_spans:
            return self._spans()
        from fusion_hf.data.table_sources import Table, load_hub, load_saved, load_table  # takes a second to import

        if self.saved is not None:
            tables = {str(self.saved): load_saved(self.saved)}
        elif self.hub is not None:
            tables = {":".join(self.hub): load_hub(*self.hub)}
        else:
            tables = {str(file): load_table(file, cache / TABLES_FOLDER) for file in self.files}
        return [Table(table, name, self.root, self.image_key) for name, table in tables.items()]

    def streams(self) -> Sequence[RecordStream]:
        """Open the data for reading from start to end."""
        if self._has_spans:
            return self._spans()
        from fusion_hf.data.table_sources import RowStream, hub_rows, saved_rows, table_rows

        if self.saved is not None:
            return [RowStream(partial(saved_rows, self.saved), str(self.saved), self.root)]
        if self.hub is not None:
            return [RowStream(partial(hub_rows, *self.hub), ":".join(self.hub), self.root)]
        return [RowStream(table_rows(file), str(file), self.root, self.image_key) for file in self.files]

    @property
    def _has_spans(self) -> bool:
        return bool(self.files) and all(file.suffix in FILE_SOURCES for file in self.files)

    def _spans(self) -> list[RecordSource]:
        """Open files whose records are read in place."""
        return [FILE_SOURCES[file.suffix](file, self.root, self.image_key) for file in self.files]


def exists(path: Path) -> bool:
    """
    Return whether a file or folder exists. A name that is invalid for files does not exist.

    Args:
        path: the path.
    """
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long or has a null character
        return False


def locate(name: str, folder: Path, image_root: Path | None = None) -> DataLocation:
    """
    Find the data that a name refers to.

    Args:
        name: a path relative to `folder`, or `OWNER/NAME` or `OWNER/NAME:SPLIT` of a data set on the Hub.
        folder: the folder of relative paths.
        image_root: the folder of the images. Defaults to the folder itself for an image folder, and to `folder`
            otherwise.

    Returns:
        The location.

    Raises:
        InputError: if nothing of this name exists, or it holds no records.
    """
    path = folder / name
    root = existing_folder(folder) if image_root is None else existing_folder(image_root, "image_root")
    if not exists(path):
        hub = HUB_ID.fullmatch(name)
        if hub is not None and Path(name).suffix not in SUFFIXES:
            return DataLocation((), root, hub=(hub["repository"], hub["split"] or DEFAULT_SPLIT))
        shown = short_name(str(path))
        raise InputError(f"{shown} does not exist. Give a file, a folder, or OWNER/NAME of a data set on the Hub.")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"The suffix of {path} must be one of {', '.join(SUFFIXES)}, got {path.suffix!r}.")
        return DataLocation((path,), root)
    if (saved := _saved(path)) is not None:
        return DataLocation((), root, saved=saved)
    for metadata in METADATA:
        if (path / metadata).is_file():
            return DataLocation((path / metadata,), root if image_root is not None else path.resolve(), FILE_NAME)
    if files := find_shards(path) or sorted(path.glob("*.parquet")):
        return DataLocation(tuple(files), root)
    allowed = f"{', '.join(METADATA)}, *.tar, *.parquet, {SAVED}"
    raise InputError(f"The folder {path} must contain one of {allowed}. Give a file in it instead.")


def _saved(path: Path) -> Path | None:
    """
    Return the folder of a saved data set: the path itself, or that of its split `train` or its only split.

    Raises:
        InputError: if there are several splits and none is called `train`.
    """
    if (path / SAVED).is_file():
        return path
    if not (path / SAVED_SPLITS).is_file():
        return None
    splits = sorted(state.parent for state in path.glob(f"*/{SAVED}"))
    named = [split for split in splits if split.name == DEFAULT_SPLIT]
    if len(found := named or splits) != 1:
        names = ", ".join(short_name(split.name) for split in splits) or "none"
        raise InputError(f"{path} is a data set with the splits {names}. Give the folder of one of them.")
    return found[0]


def existing_folder(folder: Path, key: str = "data_root") -> Path:
    """
    Resolve the path of an existing folder.

    Args:
        folder: the path.
        key: the name of the setting, for errors.

    Raises:
        InputError: if the path is not a folder.
    """
    if not folder.is_dir():
        raise InputError(f"`{key}` must be the folder that holds the images, got {folder}, which is not a folder.")
    return folder.resolve()
