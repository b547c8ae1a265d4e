"""Data sets of records for a `DataLoader`, with random access or as a stream."""

import copy
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from fusion_hf.common.errors import InputError
from fusion_hf.data.broken_records import BrokenRecords
from fusion_hf.data.image_files import open_record_image
from fusion_hf.data.image_places import NO_PLACES, ImagePlaces
from fusion_hf.data.index import Index, default_cache, open_index
from fusion_hf.data.mixture import MixtureEntry, Rows, Strategy, read_entries
from fusion_hf.data.record_parsing import (
    ON_TRUNCATED,
    OnBroken,
    OnTruncated,
    Raw,
    RecordProblem,
    SampleKey,
    parse_record,
)
from fusion_hf.data.sources import RecordSource, RecordStream
from fusion_hf.model.image_opening_fusion import MAX_IMAGE_PIXELS


def load_records(
    source: str | Path,
    *,
    root: str | Path | None = None,
    on_broken: OnBroken = "error",
    max_skipped: int = 100,
    skipped_file: str | Path | None = None,
    cache: str | Path | None = None,
    streaming: bool = False,
    seed: int = 0,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    exif_transpose: bool = True,
    on_truncated: OnTruncated = "error",
    image_roots: Iterable[str | Path] | None = None,
    image_hosts: Iterable[str] | None = None,
    private_image_hosts: Iterable[str] | None = None,
) -> "RecordDataset | StreamedRecords":
    """
    Load the records of a mixture (.yaml), a JSON, JSONL, Parquet, CSV or tar file, a folder, or a data set on the
    Hub.

    Args:
        source: a file, a folder, or the name of a data set on the Hub.
        root: the folder that relative paths and images are in. Defaults to the folder of `source`.
        on_broken: `error` raises an error at a broken record, and `skip` leaves it out, see [`BrokenRecords`].
        max_skipped: the maximum number of skipped records.
        skipped_file: the JSONL file for skipped records. Defaults to a temporary file.
        cache: the folder for indexes. Defaults to [`default_cache`].
        streaming: whether to read the records in their order, without an index.
        seed: the seed for `random:N` in a mixture.
        max_image_pixels: the maximum number of pixels of an image. A record with a larger one is broken.
        exif_transpose: whether to rotate images by their EXIF orientation, as the image processor does.
        on_truncated: `error` treats truncated image files as broken, and `load` uses what can be decoded.
        image_roots: further folders that absolute paths and symbolic links of images may point to.
        image_hosts: the hosts that images may be downloaded from by http or https, as `NAME` or `NAME:PORT`.
        private_image_hosts: the same for hosts of a private network or of this machine.

    Returns:
        A [`RecordDataset`], or [`StreamedRecords`] if `streaming`. Each record is `{"id", "image", "messages"}`.

    Raises:
        InputError: if a file is missing or unreadable, or a record is broken and `on_broken` is `error`.

    Example:

    ```python
    >>> import json
    >>> from pathlib import Path
    >>> from fusion_hf.training import load_records
    >>> turns = [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "Two."}]
    >>> written = Path("records.json").write_text(json.dumps([{"id": "sum", "conversations": turns}]))
    >>> records = load_records("records.json", cache="cache")
    >>> records[0]["messages"][1]
    {'role': 'assistant', 'content': 'Two.'}

    ```
    """
    entries = read_entries(source, root)
    broken = BrokenRecords(on_broken, max_skipped, skipped_file)
    places = ImagePlaces.named(image_roots, image_hosts, private_image_hosts)
    reader = RecordReader(broken, max_image_pixels, exif_transpose, on_truncated, places)
    if streaming:
        return StreamedRecords(entries, reader)
    parts = read_parts(entries, default_cache() if cache is None else Path(cache).expanduser(), seed)
    return RecordDataset(parts, reader)


@dataclass(frozen=True)
class RecordReader:
    """Convert stored records to the items of a data set. See [`load_records`] for the settings."""

    broken: BrokenRecords
    max_image_pixels: int
    exif_transpose: bool
    on_truncated: OnTruncated
    places: ImagePlaces = NO_PLACES

    def __post_init__(self) -> None:
        if self.on_truncated not in ON_TRUNCATED:
            raise InputError(f"`on_truncated` must be one of {', '.join(ON_TRUNCATED)}, got {self.on_truncated!r}.")

    def __call__(self, stream: RecordStream, index: int, raw: Raw) -> dict[str, Any]:
        """
        Convert one record.

        Args:
            stream: the stream or source of the record.
            index: the index of the record in it.
            raw: the stored record.

        Returns:
            `{"id", "image", "messages"}`, or `{"id", "skipped"}` with the reason if the record is broken and skipped.

        Raises:
            InputError: if the record is broken and `on_broken` is `error`, or there are too many broken records.
        """
        identity = None
        try:
            record = parse_record(raw, index, stream.image_key)
            identity = record.id
            settings = (stream.root, self.max_image_pixels, self.exif_transpose, self.on_truncated, self.places)
            image = None if record.image is None else open_record_image(record.image, *settings)
        except RecordProblem as problem:
            problem.identity = identity if identity is not None else problem.identity
            self.broken.handle([(stream.name, index, problem)])
            return {"id": problem.identity, "skipped": str(problem)}
        return {"id": record.id, "image": image, "messages": record.messages}


@dataclass(frozen=True)
class MixturePart:
    """
    Records of one source.

    Attributes:
        source: the source.
        index: its index.
        rows: the selected records, as a range or sorted numbers.
    """

    source: RecordSource
    index: Index
    rows: Rows


def read_parts(entries: Iterable[MixtureEntry], cache: Path, seed: int) -> list[MixturePart]:
    """
    Select the records of a mixture's entries, in order. Broken records are still included.

    Args:
        entries: the entries.
        cache: the folder for indexes.
        seed: the seed for `random:N`.

    Raises:
        InputError: if a file cannot be read or has fewer records than an entry asks for.
    """
    parts = []
    for number, entry in enumerate(entries):
        sources = entry.locate().sources(cache)
        indexes = [open_index(source, cache) for source in sources]
        ends = np.cumsum([len(index) for index in indexes])
        rows = entry.sampling_strategy.rows(int(ends[-1]), (seed, number), entry.name)
        for source, index, end in zip(sources, indexes, ends.tolist(), strict=True):
            inside = _inside(rows, end - len(index), end)
            if len(inside):
                parts.append(MixturePart(source, index, inside))
    return parts


def _inside(rows: Rows, begin: int, end: int) -> Rows:
    """Return the rows of a list of files that lie in one of them, counted from its first record."""
    if isinstance(rows, range):
        return range(max(rows.start, begin) - begin, max(min(rows.stop, end) - begin, 0))
    first, last = np.searchsorted(rows, (begin, end))
    return rows[first:last] - rows.dtype.type(begin)


class RecordDataset(Dataset):
    """
    A map-style data set of records.

    A key is an index or a [`SampleKey`]. Items are those of [`RecordReader`], with the `query_len` of their key.

    Records that are broken apart from their image are found when the data set is made, and are left out if `on_broken`
    is `skip`. Broken images are found when they are read.

    Args:
        parts: the selected records of each source.
        reader: converts stored records to items.

    Raises:
        InputError: if a record is broken and `on_broken` is `error`, or no record is left.
    """

    def __init__(self, parts: list[MixturePart], reader: RecordReader):
        self.reader = reader
        self.parts = [self._without_broken(part) for part in parts]
        self.ends = np.cumsum([len(part.rows) for part in self.parts])
        if len(self) == 0:
            raise InputError("`data` must contain at least one valid record, but all records are broken.")

    def _without_broken(self, part: MixturePart) -> MixturePart:
        if part.index.num_broken == 0:
            return part
        broken = part.index.broken()
        rows = part.rows
        if isinstance(rows, range):
            broken = broken[(broken >= rows.start) & (broken < rows.stop)]
            rows = np.arange(rows.start, rows.stop, dtype=np.uint32 if rows.stop < 2**32 else np.uint64)
        kept = np.isin(rows, broken, invert=True)
        found = rows[~kept].tolist() if self.reader.broken.on_broken == "skip" else rows[~kept][:1].tolist()
        self.reader.broken.handle((part.source.name, index, part.index.problem(index)) for index in found)
        return MixturePart(part.source, part.index, rows[kept]) if found else part

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def lengths(self) -> np.ndarray:
        """Words of each record, int32 `(len,)`, negative for records without an image."""
        return np.concatenate([part.index.lengths(part.rows) for part in self.parts])

    @property
    def turns(self) -> np.ndarray:
        """Number of questions of each record, int32 `(len,)`."""
        indexes = [open_index(part.source, part.index.file.parent, needs_turns=True) for part in self.parts]
        return np.concatenate([index.turns(part.rows) for index, part in zip(indexes, self.parts, strict=True)])

    @property
    def num_skipped(self) -> int:
        """Number of different records that any process has skipped so far."""
        return len(self.reader.broken)

    def __getitem__(self, key: "int | SampleKey") -> dict[str, Any]:
        if isinstance(key, SampleKey):
            return {**self[key.index], "query_len": key.query_len}
        index = operator.index(key)
        if not 0 <= index < len(self):
            raise IndexError(f"The index must be less than {len(self)}, got {index}.")
        number = int(np.searchsorted(self.ends, index, side="right"))
        part = self.parts[number]
        begin = int(self.ends[number]) - len(part.rows)
        row = int(part.rows[index - begin])
        raw = part.source.read(row, part.index.place(row))
        return self.reader(part.source, row, raw)


class StreamedRecords(IterableDataset):
    """
    An iterable data set of records in the order of their files, epoch after epoch, without an index.

    Micro-batch k of rank r holds the records [(k * world_size + r) * batch_size, ... + batch_size) of the endless
    stream. The workers of a `DataLoader` with this batch size take micro-batches in turn, so that each record goes to
    one worker and the order does not depend on the number of workers. A skipped record keeps its place as an item with
    `skipped`, so that ranks need not read the records of others.

    Attributes:
        rank: the rank that these records are for; see `split`.
        world_size: the number of ranks.
        batch_size: the number of records per micro-batch.
        epochs: the number of passes. None repeats without end.
        start: the number of micro-batches of this rank to leave out when resuming.
    """

    rank, world_size, batch_size = 0, 1, 1
    epochs: int | None = None
    start = 0

    def __init__(self, entries: Iterable[MixtureEntry], reader: RecordReader):
        self.reader = reader
        self.streams: list[tuple[RecordStream, int | None]] = []  # each stream with the number of records to take
        for entry in entries:
            self.streams += _streams(entry)

    def split(
        self, *, rank: int = 0, world_size: int = 1, batch_size: int = 1, epochs: int | None = None, start: int = 0
    ) -> "StreamedRecords":
        """
        Return the part of the stream for one rank.

        Args:
            rank: the number of the rank.
            world_size: the number of ranks.
            batch_size: the number of records per micro-batch.
            epochs: the number of passes. None repeats without end.
            start: the number of micro-batches of this rank to leave out.
        """
        if not 0 <= rank < world_size or batch_size < 1 or start < 0:
            raise ValueError(
                "`rank` must be from 0 to less than `world_size`, `batch_size` at least 1 and `start` at least 0, "
                "got "
                f"rank {rank} of {world_size}, batch_size {batch_size} and start {start}."
            )
        other = copy.copy(self)
        other.rank, other.world_size, other.batch_size = rank, world_size, batch_size
        other.epochs, other.start = epochs, start
        return other

    @property
    def num_skipped(self) -> int:
        """Number of different records that any process has skipped so far."""
        return len(self.reader.broken)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        for position, (stream, index, raw) in enumerate(self._endless()):
            batch, rank = divmod(position // self.batch_size, self.world_size)
            if rank == self.rank and batch >= self.start and (batch - self.start) % workers == worker:
                yield self.reader(stream, index, raw)

    def _endless(self) -> Iterator[tuple[RecordStream, int, Raw]]:
        epoch = 0
        while self.epochs is None or epoch < self.epochs:
            empty = True
            for stream, count in self.streams:
                for index, item in enumerate(islice(stream.scan(), count)):
                    empty = False
                    yield stream, index, item.raw
            if empty:
                names = ", ".join(stream.name for stream, _ in self.streams)
                raise InputError(f"`data` must contain at least one record, got none in {names}.")
            epoch += 1


def _streams(entry: MixtureEntry) -> list[tuple[RecordStream, int | None]]:
    """Return the streams of an entry. Since the number of records is unknown, it may take all or the first ones."""
    streams = entry.locate().streams()
    strategy: Strategy = entry.sampling_strategy
    if strategy.amount is None:
        return [(stream, None) for stream in streams]
    if strategy.kind != "first" or not isinstance(strategy.amount, int) or len(streams) > 1:
        allowed = "all or first:N of one file"
        raise InputError(f"{entry.name}: `sampling_strategy` must be {allowed} when streaming, got {strategy.text!r}.")
    return [(streams[0], strategy.amount)]
