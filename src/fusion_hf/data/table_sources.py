"""Records in columns: Parquet and CSV files and data sets of the Hub, as memory-mapped `datasets.Dataset` objects."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.data.record_layouts import COMPLETION, IMAGES, LAYOUT_KEYS, PAIRS_KEY, PROMPT, TURN_KEYS, turn_renames
from fusion_hf.data.record_parsing import FILE_NAME, IMAGE_KEY, Raw, RecordProblem
from fusion_hf.data.sources import MAX_RECORD_BYTES, RecordSource, RecordStream, SourceItem, file_state

IMAGE_COLUMNS = (IMAGE_KEY, "images", FILE_NAME)
COLUMNS = ("id", *IMAGE_COLUMNS, *TURN_KEYS)
HUB_SECONDS = 10.0  # timeout for a request to the Hub
CLOSE = 0.7  # minimum similarity of column names, from 0 to 1
ROWS = 64  # rows read at a time, which may hold images
PARQUET = ".parquet"
# files in a folder written by `Dataset.save_to_disk`
SAVED_STATE, SAVED_INFO = "state.json", "dataset_info.json"
MAX_SAVED_BYTES = 2**24  # limit for each of the two files

Row: TypeAlias = dict[str, Any]


class Table(RecordSource):
    """
    Rows of a data set. Images stay encoded.

    Args:
        dataset: a data set in memory-mapped Arrow files, whose pages the kernel can reclaim.
        name: the name of the data set, for errors.
        root: the folder of image paths.
        image_key: the field that holds the image.
    """

    kind: ClassVar[str] = "Table"
    place_names = ()
    unit = "record"

    def __init__(self, dataset: datasets.Dataset, name: str, root: Path, image_key: str = IMAGE_KEY):
        self.dataset = dataset.select_columns(known_columns(dataset.column_names, name)).with_format("arrow")
        self.name, self.root, self.image_key = name, root, image_key
        self.total = len(dataset)
        self.files = [Path(file["filename"]) for file in dataset.cache_files]
        self.size = sum(file.stat().st_size for file in self.files)

    def state(self) -> str:
        return "\n".join([self.name, *map(file_state, self.files)])

    def scan(self) -> Iterator[SourceItem]:
        return _items(_encoded_rows(self.dataset))

    def read(self, index: int, place: tuple[int, ...]) -> Raw:
        return _row(self.dataset[index].to_pylist()[0])


class RowStream(RecordStream):
    """
    Rows of a Parquet or CSV file or of a data set on the Hub, read from start to end without a copy.

    Args:
        begin: returns an iterator over the rows each time it is called.
        name: the name of the data, for errors.
        root: the folder of image paths.
        image_key: the field that holds the image.
    """

    def __init__(self, begin: Callable[[], Iterator[Row]], name: str, root: Path, image_key: str = IMAGE_KEY):
        self.begin, self.name, self.root, self.image_key = begin, name, root, image_key

    def scan(self) -> Iterator[SourceItem]:
        return _items(self.begin())


def table_rows(path: Path) -> Callable[[], Iterator[Row]]:
    """
    Make a function that returns an iterator over the rows of a Parquet or CSV file.

    Args:
        path: the file.

    Raises:
        InputError: if the file is not of this kind or has no columns of records.
    """
    columns = table_columns(path)
    return partial(_parquet_rows, path, columns) if path.suffix == PARQUET else partial(_csv_rows, path)


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS, columns=columns):
            yield from batch.to_pylist()


def _csv_rows(path: Path, state: str = "") -> Iterator[Row]:
    """Yield rows whose columns are all texts. `state` becomes part of the key under which `datasets` caches them."""
    reader = _csv_lines(path)
    header = next(reader)
    columns = known_columns(header, str(path))
    for row in reader:
        fields = dict(zip(header, row, strict=False))  # missing columns of a short row stay missing
        yield {name: fields.get(name) for name in columns}


def _csv_lines(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.reader(stream)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"data: {path} is not a CSV file in UTF-8 ({error}).") from error


def hub_rows(repository: str, split: str) -> Iterator[Row]:
    """
    Yield the rows of a split of a Hub data set, read over the network.

    Args:
        repository: the Hub id of the data set.
        split: the name of the split.
    """
    return _encoded_rows(load_hub(repository, split, streaming=True))


def _encoded_rows(dataset: Any) -> Iterator[Row]:
    """Yield rows whose images, including those in lists, stay encoded."""
    return (row for table in dataset.with_format("arrow").iter(batch_size=ROWS) for row in table.to_pylist())


def _items(rows: Iterable[Row]) -> Iterator[SourceItem]:
    for number, row in enumerate(rows):
        yield SourceItem(_row(row), (), number + 1)


def _row(row: Row) -> Raw:
    """Parse JSON text in columns that cannot hold objects, and drop empty values."""
    fields = {name: None if value == "" else value for name, value in row.items()}
    for name in (*TURN_KEYS, PAIRS_KEY):
        written = fields.get(name)
        if isinstance(written, str):
            try:
                fields[name] = json.loads(written)
            except (ValueError, RecursionError) as error:
                identity = None if fields.get("id") is None else str(fields["id"])
                return RecordProblem("unreadable", f"`{name}` is not valid JSON ({error})", identity)
    return fields


def known_columns(names: Iterable[str], where: str) -> list[str]:
    """
    Select the columns that records are read from.

    Args:
        names: the names of all columns.
        where: the name of the data, for errors.

    Raises:
        InputError: if no column holds conversations.
    """
    names = list(names)
    has_turns = not set(names).isdisjoint(TURN_KEYS)
    # the names of indexes and caches depend on these columns, so they must stay the same
    known = [name for name in names if name in COLUMNS or (not has_turns and name in LAYOUT_KEYS)]
    if not has_turns and PAIRS_KEY not in known and not {PROMPT, COMPLETION} <= set(known):
        allowed = f"{', '.join(TURN_KEYS)}, {PAIRS_KEY}, or {PROMPT} and {COMPLETION}"
        near = {name: close[0] for name in names if (close := get_close_matches(name, TURN_KEYS, 1, CLOSE))}
        renames = near or turn_renames(dict.fromkeys(names, ""))
        advice = ", ".join(f"rename {short_name(old)!r} to {new!r}" for old, new in renames.items())
        raise InputError(f"data: {where} must have a column {allowed}; {advice or 'does it hold records?'}")
    if set(known).isdisjoint(IMAGE_COLUMNS) and (unread := [name for name in names if name in IMAGES]):
        raise InputError(f"data: {where} has a column {unread[0]!r}. Rename it to {IMAGE_KEY!r}.")
    return known


def table_columns(path: Path) -> list[str]:
    """
    Select the columns of a Parquet or CSV file that records are read from.

    Args:
        path: the file.

    Raises:
        InputError: if the file is not of this kind or has no columns of records.
    """
    if path.suffix != PARQUET:
        return known_columns(next(_csv_lines(path), ()), str(path))
    file_state(path)
    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data: {path} is not a Parquet file ({error}).") from error
    return known_columns(names, str(path))


def load_table(path: Path, cache: Path) -> datasets.Dataset:
    """
    Convert a Parquet or CSV file to Arrow in `cache`, since compressed data and text have no random access.

    Args:
        path: the file.
        cache: the folder for converted files.

    Raises:
        InputError: if the file cannot be read.
    """
    columns, settings = table_columns(path), {"cache_dir": str(cache), "keep_in_memory": False}
    try:
        if path.suffix == PARQUET:
            return datasets.Dataset.from_parquet(str(path), columns=columns, **settings)
        features = datasets.Features({name: datasets.Value("string") for name in columns})
        arguments = {"path": path, "state": file_state(path)}  # the cache is keyed by these
        return datasets.Dataset.from_generator(_csv_rows, features=features, gen_kwargs=arguments, **settings)
    except DatasetGenerationError as error:
        kind = "Parquet" if path.suffix == PARQUET else "CSV"
        raise InputError(f"data: {path} cannot be read as {kind} ({error.__cause__ or error}).") from error


def saved_rows(folder: Path) -> Iterator[Row]:
    """
    Yield the rows of a data set that `Dataset.save_to_disk` wrote.

    Args:
        folder: the folder of the data set.
    """
    dataset = load_saved(folder)
    return _encoded_rows(dataset.select_columns(known_columns(dataset.column_names, str(folder))))


def load_saved(folder: Path) -> datasets.Dataset:
    """
    Open a data set that `Dataset.save_to_disk` wrote, memory-mapped in place.

    Args:
        folder: the folder of the data set.

    Raises:
        InputError: if it cannot be read, or names a file outside its folder.
    """
    try:
        state = json.loads(_read_small(folder / SAVED_STATE))
        _read_small(folder / SAVED_INFO)
        names = [file["filename"] for file in state["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise InputError(f"data: {folder / SAVED_STATE} must name files in its own folder only.")
        dataset = datasets.load_from_disk(str(folder), keep_in_memory=False)
        for batch in dataset.data.table.to_batches():
            batch.validate(full=True)  # offsets beyond the end of a file would crash the process
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        detail = f"{type(error).__name__}: {error}"
        raise InputError(f"data: {folder} cannot be read as a saved data set ({detail}).") from error
    return dataset


def _read_small(path: Path) -> bytes:
    with path.open("rb") as stream:
        content = stream.read(MAX_SAVED_BYTES + 1)
    if len(content) > MAX_SAVED_BYTES:
        raise InputError(f"data: {path} must have at most {MAX_SAVED_BYTES} bytes. Is this a saved data set?")
    return content


def load_hub(repository: str, split: str, streaming: bool = False) -> Any:
    """
    Load a split of a Hub data set through the cache of `datasets`.

    Args:
        repository: the Hub id of the data set.
        split: the name of the split.
        streaming: whether to stream it instead.

    Raises:
        InputError: if it does not exist, or the Hub cannot be reached.
    """
    try:
        with _cache_alone() if _is_out_of_reach(repository) else nullcontext():
            return datasets.load_dataset(repository, split=split, streaming=streaming)
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, ValueError) as error:
        advice = "Give an existing file, or a data set of the Hub as OWNER/NAME or OWNER/NAME:SPLIT"
        raise InputError(f"data: {repository}:{split} cannot be loaded ({error}). {advice}.") from error


def _is_out_of_reach(repository: str) -> bool:
    """
    Return whether the Hub fails to answer one request. `datasets` would repeat each of its own for half a
    minute.
    """
    if is_offline_mode():
        return False  # `datasets` handles this itself
    try:
        HfApi().dataset_info(repository, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):  # `datasets` reports this answer in more detail
        return False
    except (HTTPError, OSError):
        return True
    return False


@contextmanager
def _cache_alone() -> Iterator[None]:
    """Let `datasets` use only what is in its cache, as if HF_HUB_OFFLINE were set."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
