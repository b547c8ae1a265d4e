"""Data sets of records for a `DataLoader`: at any place, or as a stream."""

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
    Load the records of a mixture (.yaml), a JSON, JSONL, Parquet, CSV or tar file, a folder or a Hub data set.

    Args:
        source: a file, a folder, or the name of a data set on the Hub.
        root: that relative paths and images are under; default: the folder of `source`.
        on_broken, max_skipped, skipped_file: what happens to broken records, see [`BrokenRecords`].
        cache: folder of the indexes; default: [`default_cache`].
        streaming: begin at once and never go back.
        seed: of `random:N` in a mixture.
        max_image_pixels: an image with more is broken.
        exif_transpose: turn images upright by their EXIF orientation, as the image processor of that setting does.
        on_truncated: `error`: an image that ends too early is broken; `load`: what there is of it is taken.
        image_roots: further folders in which images may be, by absolute paths or by links.
        image_hosts: hosts from which images at http(s) addresses are fetched, as `NAME` or `NAME:PORT`.
        private_image_hosts: the same for hosts of a private network or of this machine.

    Returns:
        [`RecordDataset`], or [`StreamedRecords`] if `streaming`: records `{"id", "image", "messages"}`.

    Raises:
        InputError: for a missing or unreadable file, and for a broken record under `error`.

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
    """Makes what a data set gives from a stored record; see [`load_records`] for the settings."""

    broken: BrokenRecords
    max_image_pixels: int
    exif_transpose: bool
    on_truncated: OnTruncated
    places: ImagePlaces = NO_PLACES

    def __post_init__(self) -> None:
        if self.on_truncated not in ON_TRUNCATED:
            raise InputError(f"on_truncated: {self.on_truncated!r}; allowed: {', '.join(ON_TRUNCATED)}.")

    def __call__(self, stream: RecordStream, index: int, raw: Raw) -> dict[str, Any]:
        """
        `{"id", "image", "messages"}`, or `{"id", "skipped"}` (the reason) for a broken record under `skip`.

        Raises:
            InputError: for a broken record under `error`, or for one too many under `skip`.
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
    """Records of one source: a range of them, or sorted numbers."""

    source: RecordSource
    index: Index
    rows: Rows


def read_parts(entries: Iterable[MixtureEntry], cache: Path, seed: int) -> list[MixturePart]:
    """
    Read what the entries of a mixture take from their files, in order; broken records are still among it.

    Raises:
        InputError: for a file that cannot be read, or has fewer records than are to be taken.
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
    """Those rows of a list of files that lie in one, counted from its begin."""
    if isinstance(rows, range):
        return range(max(rows.start, begin) - begin, max(min(rows.stop, end) - begin, 0))
    first, last = np.searchsorted(rows, (begin, end))
    return rows[first:last] - rows.dtype.type(begin)


class RecordDataset(Dataset):
    """
    Records at any place. A key is an index or a [`SampleKey`]; items are as [`RecordReader`]'s, and have the
    `query_len` of their key.

    Records that are broken without a look at their image are found here: under `skip` they are no items of the data
    set. Those with a broken image are found when they are read.
    """

    def __init__(self, parts: list[MixturePart], reader: RecordReader):
        self.reader = reader
        self.parts = [self._without_broken(part) for part in parts]
        self.ends = np.cumsum([len(part.rows) for part in self.parts])
        if len(self) == 0:
            raise InputError("data: no record is left; all are broken.")

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
        """Words of every record, int32; negative for one without an image."""
        return np.concatenate([part.index.lengths(part.rows) for part in self.parts])

    @property
    def turns(self) -> np.ndarray:
        """Questions of every record, int32."""
        indexes = [open_index(part.source, part.index.file.parent, needs_turns=True) for part in self.parts]
        return np.concatenate([index.turns(part.rows) for index, part in zip(indexes, self.parts, strict=True)])

    @property
    def num_skipped(self) -> int:
        """Different records skipped so far, by any process."""
        return len(self.reader.broken)

    def __getitem__(self, key: "int | SampleKey") -> dict[str, Any]:
        if isinstance(key, SampleKey):
            return {**self[key.index], "query_len": key.query_len}
        index = operator.index(key)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        part = self.parts[number]
        begin = int(self.ends[number]) - len(part.rows)
        row = int(part.rows[index - begin])
        raw = part.source.read(row, part.index.place(row))
        return self.reader(part.source, row, raw)


class StreamedRecords(IterableDataset):
    """
    Records in the order of their files, one epoch after another, without an index.

    Micro-batch k of rank r is records [(k * world_size + r) * batch_size, ... + batch_size) of the endless stream, and
    the workers of a `DataLoader` of that batch size take micro-batches in turn: each record goes to one of them, and
    the order does not depend on their number. A broken record keeps its place under `skip`: it is an item with
    `skipped`, so that ranks need not read the records of others.

    Attributes:
        rank, world_size, batch_size: of the part that this is; see `split`.
        epochs: passes; None: without end.
        start: micro-batches of this rank that are passed over, for resuming.
    """

    rank, world_size, batch_size = 0, 1, 1
    epochs: int | None = None
    start = 0

    def __init__(self, entries: Iterable[MixtureEntry], reader: RecordReader):
        self.reader = reader
        self.streams: list[tuple[RecordStream, int | None]] = []  # and how many of its records
        for entry in entries:
            self.streams += _streams(entry)

    def split(
        self, *, rank: int = 0, world_size: int = 1, batch_size: int = 1, epochs: int | None = None, start: int = 0
    ) -> "StreamedRecords":
        """Return the same records for a rank of many, from a micro-batch on."""
        if not 0 <= rank < world_size or batch_size < 1 or start < 0:
            raise ValueError(f"rank {rank} of {world_size}, batch_size {batch_size}, start {start}")
        other = copy.copy(self)
        other.rank, other.world_size, other.batch_size = rank, world_size, batch_size
        other.epochs, other.start = epochs, start
        return other

    @property
    def num_skipped(self) -> int:
        """Different records skipped so far, by any process."""
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
                raise InputError(f"data: no records in {names}.")
            epoch += 1


def _streams(entry: MixtureEntry) -> list[tuple[RecordStream, int | None]]:
    """What can be streamed: of files whose number of records is not known, all or the first ones."""
    streams = entry.locate().streams()
    strategy: Strategy = entry.sampling_strategy
    if strategy.amount is None:
        return [(stream, None) for stream in streams]
    if strategy.kind != "first" or not isinstance(strategy.amount, int) or len(streams) > 1:
        allowed = "all, or first:N of one file"
        raise InputError(f"{entry.name}: sampling_strategy {strategy.text!r}; allowed when streaming: {allowed}.")
    return [(streams[0], strategy.amount)]
