"""What a name stands for: a file, a folder or a data set of the Hub, by its suffix and by what lies in it."""

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
SAVED = "state.json"  # in a folder that `Dataset.save_to_disk` wrote
SAVED_SPLITS = "dataset_dict.json"  # in one of `DatasetDict.save_to_disk`, beside a folder for each split
METADATA = ("metadata.jsonl", "metadata.csv")
HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<split>\w+))?")
DEFAULT_SPLIT = "train"
TABLES_FOLDER = "tables"  # in the cache: Parquet and CSV files as Arrow


@dataclass(frozen=True)
class DataLocation:
    """Existing files of one kind, or a data set of the Hub; what their images are under and in which field."""

    files: tuple[Path, ...]
    root: Path
    image_key: str = IMAGE_KEY
    hub: tuple[str, str] | None = None  # repository and split
    saved: Path | None = None  # the folder of a saved data set

    def sources(self, cache: Path) -> list[RecordSource]:
        """List what has random access; Parquet and CSV are written to `cache` for it."""
        if self._has_spans:
            return self._spans()
        from fusion_hf.data.table_sources import Table, load_hub, load_saved, load_table  # take a second to import

        if self.saved is not None:
            tables = {str(self.saved): load_saved(self.saved)}
        elif self.hub is not None:
            tables = {":".join(self.hub): load_hub(*self.hub)}
        else:
            tables = {str(file): load_table(file, cache / TABLES_FOLDER) for file in self.files}
        return [Table(table, name, self.root, self.image_key) for name, table in tables.items()]

    def streams(self) -> Sequence[RecordStream]:
        """List what is read from beginning to end."""
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
        """Files whose records are read where they lie."""
        return [FILE_SOURCES[file.suffix](file, self.root, self.image_key) for file in self.files]


def exists(path: Path) -> bool:
    """Return whether there is such a file or folder; a name that no file can have has none."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def locate(name: str, folder: Path, image_root: Path | None = None) -> DataLocation:
    """
    Args:
        name: a path, relative to `folder`; or `OWNER/NAME` or `OWNER/NAME:SPLIT` of the Hub.
        image_root: of the images; default: the folder itself for an image folder, else `folder`.

    Raises:
        InputError: if there is nothing of this name, or nothing that holds records.
    """
    path = folder / name
    root = existing_folder(folder) if image_root is None else existing_folder(image_root, "image_root")
    if not exists(path):
        hub = HUB_ID.fullmatch(name)
        if hub is not None and Path(name).suffix not in SUFFIXES:
            return DataLocation((), root, hub=(hub["repository"], hub["split"] or DEFAULT_SPLIT))
        shown = short_name(str(path))
        raise InputError(f"{shown} does not exist; allowed: a file, a folder or OWNER/NAME of the Hub.")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path} has the suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}.")
        return DataLocation((path,), root)
    if (saved := _saved(path)) is not None:
        return DataLocation((), root, saved=saved)
    for metadata in METADATA:
        if (path / metadata).is_file():
            return DataLocation((path / metadata,), root if image_root is not None else path.resolve(), FILE_NAME)
    if files := find_shards(path) or sorted(path.glob("*.parquet")):
        return DataLocation(tuple(files), root)
    allowed = f"{', '.join(METADATA)}, *.tar, *.parquet, {SAVED}"
    raise InputError(f"{path} has none of {allowed}; name a file in it.")


def _saved(path: Path) -> Path | None:
    """
    The folder of a saved data set: the path itself, or that of the split `train`, or of the only one, in it.

    Raises:
        InputError: if there are several splits, but none of this name.
    """
    if (path / SAVED).is_file():
        return path
    if not (path / SAVED_SPLITS).is_file():
        return None
    splits = sorted(state.parent for state in path.glob(f"*/{SAVED}"))
    named = [split for split in splits if split.name == DEFAULT_SPLIT]
    if len(found := named or splits) != 1:
        names = ", ".join(short_name(split.name) for split in splits) or "none"
        raise InputError(f"{path} is a data set with the splits {names}; name the folder of one of them.")
    return found[0]


def existing_folder(folder: Path, key: str = "data_root") -> Path:
    """
    Resolve a folder; `key` names it.

    Raises:
        InputError: if it is none.
    """
    if not folder.is_dir():
        raise InputError(f"{key}: {folder} is no folder; name the one that the images are under.")
    return folder.resolve()
