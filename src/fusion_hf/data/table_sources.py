"""Records in columns: Parquet and CSV files, and data sets of the Hub, as memory-mapped `datasets.Dataset`s."""

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
HUB_SECONDS = 10.0  # until the Hub answers
CLOSE = 0.7  # of names of columns, from 0 to 1
ROWS = 64  # read at once: they may hold images
PARQUET = ".parquet"
# of a folder that `Dataset.save_to_disk` wrote
SAVED_STATE, SAVED_INFO = "state.json", "dataset_info.json"
MAX_SAVED_BYTES = 2**24  # of each of both

Row: TypeAlias = dict[str, Any]


class Table(RecordSource):
    """
    Rows of a data set whose images, if it has any, stay encoded.

    Args:
        dataset: in Arrow files that are memory-mapped. Their pages are the kernel's, which takes them back when memory
            is short.
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
    Rows of a Parquet or CSV file or of a data set of the Hub, from beginning to end and without a copy.

    Args:
        begin: gives the rows, each time that it is called.
    """

    def __init__(self, begin: Callable[[], Iterator[Row]], name: str, root: Path, image_key: str = IMAGE_KEY):
        self.begin, self.name, self.root, self.image_key = begin, name, root, image_key

    def scan(self) -> Iterator[SourceItem]:
        return _items(self.begin())


def table_rows(path: Path) -> Callable[[], Iterator[Row]]:
    """
    Make what gives the rows of a Parquet or CSV file.

    Raises:
        InputError: if it is no such file, or none of records.
    """
    columns = table_columns(path)
    return partial(_parquet_rows, path, columns) if path.suffix == PARQUET else partial(_csv_rows, path)


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS, columns=columns):
            yield from batch.to_pylist()


def _csv_rows(path: Path, state: str = "") -> Iterator[Row]:
    """All columns are texts. `state` is among the names of what `datasets` caches."""
    reader = _csv_lines(path)
    header = next(reader)
    columns = known_columns(header, str(path))
    for row in reader:
        fields = dict(zip(header, row, strict=False))  # what a short row lacks is missing
        yield {name: fields.get(name) for name in columns}


def _csv_lines(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.reader(stream)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"data: {path} is no CSV in UTF-8 ({error}).") from error


def hub_rows(repository: str, split: str) -> Iterator[Row]:
    """The rows of a split of a data set of the Hub, read over the network."""
    return _encoded_rows(load_hub(repository, split, streaming=True))


def _encoded_rows(dataset: Any) -> Iterator[Row]:
    """Rows whose images, those in lists too, stay encoded."""
    return (row for table in dataset.with_format("arrow").iter(batch_size=ROWS) for row in table.to_pylist())


def _items(rows: Iterable[Row]) -> Iterator[SourceItem]:
    for number, row in enumerate(rows):
        yield SourceItem(_row(row), (), number + 1)


def _row(row: Row) -> Raw:
    """Where a column cannot hold objects, the turns are JSON text, and what is missing is empty."""
    fields = {name: None if value == "" else value for name, value in row.items()}
    for name in (*TURN_KEYS, PAIRS_KEY):
        written = fields.get(name)
        if isinstance(written, str):
            try:
                fields[name] = json.loads(written)
            except (ValueError, RecursionError) as error:
                identity = None if fields.get("id") is None else str(fields["id"])
                return RecordProblem("unreadable", f"{name} is no JSON ({error})", identity)
    return fields


def known_columns(names: Iterable[str], where: str) -> list[str]:
    """
    Raises:
        InputError: if there is none with conversations.
    """
    names = list(names)
    has_turns = not set(names).isdisjoint(TURN_KEYS)
    # with turns, the same columns as ever: names of indexes and caches follow from them
    known = [name for name in names if name in COLUMNS or (not has_turns and name in LAYOUT_KEYS)]
    if not has_turns and PAIRS_KEY not in known and not {PROMPT, COMPLETION} <= set(known):
        allowed = f"{', '.join(TURN_KEYS)}, {PAIRS_KEY}, or {PROMPT} and {COMPLETION}"
        near = {name: close[0] for name in names if (close := get_close_matches(name, TURN_KEYS, 1, CLOSE))}
        renames = near or turn_renames(dict.fromkeys(names, ""))
        advice = ", ".join(f"rename {short_name(old)!r} to {new!r}" for old, new in renames.items())
        raise InputError(f"data: {where} has no column of {allowed}; {advice or 'are these records?'}")
    if set(known).isdisjoint(IMAGE_COLUMNS) and (unread := [name for name in names if name in IMAGES]):
        raise InputError(f"data: {where} has a column {unread[0]!r}; rename it to {IMAGE_KEY!r}.")
    return known


def table_columns(path: Path) -> list[str]:
    """
    Raises:
        InputError: if it is no Parquet or CSV file, or none of records.
    """
    if path.suffix != PARQUET:
        return known_columns(next(_csv_lines(path), ()), str(path))
    file_state(path)
    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data: {path} is no Parquet file ({error}).") from error
    return known_columns(names, str(path))


def load_table(path: Path, cache: Path) -> datasets.Dataset:
    """
    Write a Parquet or CSV file to `cache` as Arrow: what is compressed, or text, cannot be read at any place.

    Raises:
        InputError: if it cannot be read.
    """
    columns, settings = table_columns(path), {"cache_dir": str(cache), "keep_in_memory": False}
    try:
        if path.suffix == PARQUET:
            return datasets.Dataset.from_parquet(str(path), columns=columns, **settings)
        features = datasets.Features({name: datasets.Value("string") for name in columns})
        arguments = {"path": path, "state": file_state(path)}  # the cache knows them again
        return datasets.Dataset.from_generator(_csv_rows, features=features, gen_kwargs=arguments, **settings)
    except DatasetGenerationError as error:
        kind = "Parquet" if path.suffix == PARQUET else "CSV"
        raise InputError(f"data: {path} cannot be read as {kind} ({error.__cause__ or error}).") from error


def saved_rows(folder: Path) -> Iterator[Row]:
    """The rows of what `Dataset.save_to_disk` wrote."""
    dataset = load_saved(folder)
    return _encoded_rows(dataset.select_columns(known_columns(dataset.column_names, str(folder))))


def load_saved(folder: Path) -> datasets.Dataset:
    """
    What `Dataset.save_to_disk` wrote, memory-mapped where it lies.

    Raises:
        InputError: if it cannot be read, or names a file elsewhere.
    """
    try:
        state = json.loads(_read_small(folder / SAVED_STATE))
        _read_small(folder / SAVED_INFO)
        names = [file["filename"] for file in state["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise InputError(f"data: {folder / SAVED_STATE} names a file outside of its folder; allowed: files in it.")
        dataset = datasets.load_from_disk(str(folder), keep_in_memory=False)
        for batch in dataset.data.table.to_batches():
            batch.validate(full=True)  # offsets that lead out of a file would end the process
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
        raise InputError(f"data: {path} has over {MAX_SAVED_BYTES} bytes; is it no saved data set?")
    return content


def load_hub(repository: str, split: str, streaming: bool = False) -> Any:
    """
    Load a split of a data set of the Hub, in the cache of `datasets`.

    Raises:
        InputError: if there is none, or the Hub cannot be reached.
    """
    try:
        with _cache_alone() if _is_out_of_reach(repository) else nullcontext():
            return datasets.load_dataset(repository, split=split, streaming=streaming)
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, ValueError) as error:
        advice = "name an existing file, or a data set of the Hub as OWNER/NAME or OWNER/NAME:SPLIT"
        raise InputError(f"data: {repository}:{split} cannot be loaded ({error}); {advice}.") from error


def _is_out_of_reach(repository: str) -> bool:
    """Whether the Hub does not answer one request: `datasets` sends each of its own for half a minute."""
    if is_offline_mode():
        return False  # which `datasets` knows
    try:
        HfApi().dataset_info(repository, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):  # `datasets` says more about this answer
        return False
    except (HTTPError, OSError):
        return True
    return False


@contextmanager
def _cache_alone() -> Iterator[None]:
    """Let `datasets` take what it has downloaded before, as where HF_HUB_OFFLINE is set."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
