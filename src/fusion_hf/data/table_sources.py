"""Records in columns: Parquet and CSV files, and data sets of the Hub, as memory-mapped `datasets.Dataset`s."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from fusion_hf.common.errors import InputError
from fusion_hf.data.record_parsing import FILE_NAME, IMAGE_KEY, Raw, RecordProblem
from fusion_hf.data.sources import MAX_RECORD_BYTES, RecordSource, RecordStream, SourceItem, file_state

COLUMNS = ("id", IMAGE_KEY, "images", FILE_NAME, "conversations", "messages")
TURNS = ("conversations", "messages")
HUB_SECONDS = 10.0  # until the Hub answers
ROWS = 64  # read at once: they may hold images
PARQUET = ".parquet"

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
        rows = (row for table in self.dataset.iter(batch_size=ROWS) for row in table.to_pylist())
        return _items(rows)

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
    """Read the rows of a split of a data set of the Hub over the network."""
    dataset = load_hub(repository, split, streaming=True)
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return iter(dataset)


def _items(rows: Iterable[Row]) -> Iterator[SourceItem]:
    for number, row in enumerate(rows):
        yield SourceItem(_row(row), (), number + 1)


def _row(row: Row) -> Raw:
    """Where a column cannot hold objects, the turns are JSON text, and what is missing is empty."""
    fields = {name: None if value == "" else value for name, value in row.items()}
    for name in TURNS:
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
    known = [name for name in names if name in COLUMNS]
    if not set(known).intersection(TURNS):
        raise InputError(f"data: {where} has no column of {', '.join(TURNS)}; are these records?")
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
    except (HfHubHTTPError, HFValidationError):  # an answer, of which `datasets` says more
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
