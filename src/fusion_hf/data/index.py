"""
Index the records of a source: the position, the length and the problem of each record.

An index is a memory-mapped Arrow file that the processes of a machine share. Its name is derived from the path, size
and modification time of the source. It is written under another name and then renamed, so that an incomplete index
never exists. A second process that needs the same index waits for the first one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import atomic_file, cache_folder
from fusion_hf.data.record_parsing import RecordProblem, parse_record
from fusion_hf.data.sources import RecordSource

READING, READING_VERSION = b"reading", b"2"  # key in an index for the layouts that were known when it was made
FORMAT_VERSION = 1  # older indexes are ignored, and new ones are written
TURNS = "turns"
ROWS_PER_BATCH = 65_536
SUFFIX = ".arrow"


class Index:
    """
    The rows of a source.

    A row has a `place` (numbers for the source's `read`), a `length`, the number of `turns` (0 if the record is
    broken), and a problem or None. Earlier versions wrote no `turns`.

    Args:
        file: an Arrow file that `open_index` wrote.
    """

    def __init__(self, file: Path):
        self.file = file
        with pa.memory_map(str(file)) as stream:
            self.table = pa.ipc.open_file(stream).read_all()
        self.places = [self.table.column(name) for name in self.table.column_names if name.startswith("place_")]

    def __len__(self) -> int:
        return self.table.num_rows

    def __reduce__(self) -> tuple[type["Index"], tuple[Path]]:
        return Index, (self.file,)

    def place(self, index: int) -> tuple[int, ...]:
        """
        Return the numbers by which the source finds a record.

        Args:
            index: the index of the record.
        """
        chunk, row = divmod(index, ROWS_PER_BATCH)
        return tuple(column.chunk(chunk)[row].as_py() for column in self.places)

    def lengths(self, rows: "range | np.ndarray") -> np.ndarray:
        """
        Return the lengths of some records.

        Args:
            rows: the indices of the records.

        Returns:
            An int32 array `(len(rows),)`.
        """
        lengths = self.table.column("length").to_numpy()
        return lengths[rows.start : rows.stop] if isinstance(rows, range) else lengths[rows]

    def turns(self, rows: "range | np.ndarray") -> np.ndarray:
        """
        Return the numbers of questions of some records.

        Args:
            rows: the indices of the records.

        Returns:
            An int32 array `(len(rows),)`.
        """
        turns = self.table.column(TURNS).to_numpy()
        return turns[rows.start : rows.stop] if isinstance(rows, range) else turns[rows]

    @property
    def num_broken(self) -> int:
        """Number of broken records."""
        return len(self) - self.table.column("problem").null_count

    def is_outdated(self, needs_turns: bool) -> bool:
        """
        Return whether an earlier version made this index that rejected layouts known now, or did not count turns.

        Args:
            needs_turns: whether turns are needed.
        """
        is_former = (self.table.schema.metadata or {}).get(READING) != READING_VERSION
        return (is_former and self.num_broken > 0) or (needs_turns and TURNS not in self.table.column_names)

    def broken(self) -> np.ndarray:
        """Return the indices of broken records in increasing order."""
        chunks = self.table.column("problem").chunks
        found = [np.flatnonzero(chunk.is_valid().to_numpy(zero_copy_only=False)) for chunk in chunks]
        starts = [number * ROWS_PER_BATCH for number in range(len(chunks))]
        return np.concatenate([start + rows for start, rows in zip(starts, found, strict=True)])

    def problem(self, index: int) -> RecordProblem:
        """
        Return the problem of a broken record.

        Args:
            index: the index of the record.
        """
        chunk, row = divmod(index, ROWS_PER_BATCH)
        values = [self.table.column(name).chunk(chunk)[row].as_py() for name in ("problem", "detail", "id")]
        return RecordProblem(*values)


def default_cache() -> Path:
    """Return the folder for indexes that is used if you name none."""
    return cache_folder() / "data"


def open_index(source: RecordSource, cache: Path, needs_turns: bool = False) -> Index:
    """
    Open the index of a source, and make it if it does not exist.

    Args:
        source: the source.
        cache: the folder for indexes.
        needs_turns: whether to replace an index of an earlier version that has no turns.

    Raises:
        InputError: if the source cannot be read or has no records, or `cache` is not writable.
    """
    file = cache / f"{source.fingerprint(FORMAT_VERSION)}{SUFFIX}"
    if (index := _existing(file)) is not None and not index.is_outdated(needs_turns):
        return index
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            index = _existing(file)  # another process may have written it in the meantime
            if index is not None and not index.is_outdated(needs_turns):
                return index
            _write(source, file)
    except OSError as error:
        raise InputError(f"`data_cache` must be a writable folder, got {cache} ({error}).") from error
    return Index(file)


def _existing(file: Path) -> Index | None:
    try:
        return Index(file)
    except (OSError, pa.ArrowInvalid):  # missing or damaged: it is written again, and errors are reported there
        return None


def _write(source: RecordSource, file: Path) -> None:
    with atomic_file(file) as stream:
        batches = _batches(source)
        first = next(batches, None)
        if first is None:
            raise InputError(f"`data` must contain at least one record, got none in {source.name}.")
        with pa.ipc.new_file(stream, first.schema) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)


def _schema(source: RecordSource) -> pa.Schema:
    places = [(f"place_{name}", pa.int64()) for name in source.place_names]
    problems = [(name, pa.string()) for name in ("problem", "detail", "id")]
    return pa.schema(
        [*places, ("length", pa.int32()), (TURNS, pa.int32()), *problems], metadata={READING: READING_VERSION}
    )


def _batches(source: RecordSource) -> Iterator[pa.RecordBatch]:
    schema = _schema(source)
    rows: list[tuple[Any, ...]] = []
    progress = tqdm(
        desc=f"index {source.name}", total=source.total, unit=source.unit, unit_scale=True, disable=None, leave=False
    )
    with progress:
        for index, item in enumerate(source.scan()):
            try:
                record = parse_record(item.raw, index, source.image_key)
                rows.append((*item.place, record.length, record.turns, None, None, None))
            except RecordProblem as problem:
                rows.append((*item.place, 0, 0, problem.kind, problem.detail, problem.identity))
            if len(rows) == ROWS_PER_BATCH:
                yield _batch(rows, schema)
                rows.clear()
                progress.update(item.done - progress.n)
        if rows:
            yield _batch(rows, schema)
            progress.update(source.total - progress.n)


def _batch(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)]
    return pa.record_batch(columns, schema=schema)
