"""What is there of a data set and what is wrong with it, before a run finds out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from fusion_hf.common.errors import InputError
from fusion_hf.data.broken_records import describe
from fusion_hf.data.image_files import find_record_image, open_record_image
from fusion_hf.data.image_places import NO_PLACES, ImagePlaces
from fusion_hf.data.index import open_index
from fusion_hf.data.mixture import MixtureEntry
from fusion_hf.data.record_parsing import OnTruncated, RecordProblem, parse_record
from fusion_hf.data.sources import RecordSource

Images = Literal["sample", "decode", "exist", "none"]
SAMPLE = 100  # images of an entry


@dataclass(frozen=True)
class ImageChecks:
    """
    What is done with the images of records.

    Attributes:
        images: `decode` all; see that all are there and decode a `sample` of them; see that they `exist`; or `none`.
            Images at addresses are fetched where they are decoded.
        max_pixels, on_truncated, places: as in training, see [`open_record_image`].
    """

    images: Images
    max_pixels: int
    on_truncated: OnTruncated = "error"
    places: ImagePlaces = NO_PLACES


@dataclass
class Problems:
    """Broken records by kind of problem: how many, and the first of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, file: str, index: int, problem: RecordProblem) -> None:
        """Count one record."""
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        self.first.setdefault(problem.kind, describe(file, index, problem))


@dataclass
class EntryReport:
    """
    One entry of a mixture.

    Attributes:
        error: why nothing can be said of it: the file is missing or unreadable, or has too few records.
        records: in its files; `taken` of them by the sampling strategy, broken ones included.
        size: bytes of its files.
        without_image: whole records that have none.
        with_image: the others; `decoded` of their images were opened, broken ones included.
    """

    name: str
    strategy: str
    error: str | None = None
    files: int = 0
    size: int = 0
    records: int = 0
    taken: int = 0
    without_image: int = 0
    with_image: int = 0
    decoded: int = 0
    problems: Problems = field(default_factory=Problems)

    @property
    def fine(self) -> bool:
        return self.error is None and not self.problems.counts


def check_entry(entry: MixtureEntry, cache: Path, checks: ImageChecks, progress: bool = True) -> EntryReport:
    """
    Look at every record of an entry, taken or not, and at its image: whether it is there, or can be decoded.

    Args:
        cache: of the indexes that are made on the way; training uses them too.
        progress: show a bar on the standard error, if that is a terminal.
    """
    report = EntryReport(entry.json_path, entry.sampling_strategy.text)
    try:
        sources = entry.locate().sources(cache)
        report.files = len(sources)
        report.size = sum(source.size for source in sources)
        indexes = [open_index(source, cache) for source in sources]
        lengths = [index.lengths(range(len(index))) for index in indexes]
        chosen = _choose(lengths, checks.images)
        for source, index, words, to_decode in zip(sources, indexes, lengths, chosen, strict=True):
            report.records += len(index)
            report.without_image += int((words < 0).sum())
            report.with_image += int((words > 0).sum())
            report.decoded += int(to_decode.sum())
            for number in index.broken().tolist() if index.num_broken else ():
                report.problems.add(source.name, number, index.problem(number))
            if checks.images != "none":
                _check_images(report.problems, source, to_decode, checks, progress)
        report.taken = entry.sampling_strategy.count(report.records, entry.name)
    except InputError as error:
        report.error = str(error)
    return report


def _choose(lengths: list[np.ndarray], images: Images) -> list[np.ndarray]:
    """Which records of each source have an image that is decoded; a sample is the same each time."""
    has_image = np.concatenate(lengths) > 0
    if images == "sample":
        places = np.flatnonzero(has_image)
        drawn = np.random.default_rng(0).choice(places, min(SAMPLE, len(places)), replace=False)
        has_image[:] = False
        has_image[drawn] = True
    elif images != "decode":
        has_image[:] = False
    return np.split(has_image, np.cumsum([len(words) for words in lengths])[:-1])


def _check_images(
    problems: Problems, source: RecordSource, to_decode: np.ndarray, checks: ImageChecks, progress: bool
) -> None:
    items = tqdm(
        source.scan(),
        desc=f"images of {source.name}",
        total=len(to_decode),
        unit="record",
        unit_scale=True,
        leave=False,
        disable=None if progress else True,
    )
    for number, item in enumerate(items):
        try:
            record = parse_record(item.raw, number, source.image_key)
        except RecordProblem:  # counted already, by the index
            continue
        try:
            if record.image is None:
                continue
            if to_decode[number]:
                open_record_image(
                    record.image,
                    source.root,
                    checks.max_pixels,
                    on_truncated=checks.on_truncated,
                    places=checks.places,
                )
            else:
                find_record_image(record.image, source.root, checks.places)
        except RecordProblem as problem:
            problem.identity = record.id
            problems.add(source.name, number, problem)
