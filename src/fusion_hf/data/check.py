"""Check a data set and report what is wrong with it, before a run does."""

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
SAMPLE = 100  # number of images per entry


@dataclass(frozen=True)
class ImageChecks:
    """
    What to check about the images of records.

    Attributes:
        images: `decode` decodes all images, `sample` decodes some and checks that all others exist, `exist` only
            checks that they exist, and `none` checks nothing. Images at addresses are downloaded when they are
            decoded.
        max_pixels: the maximum number of pixels, see [`open_record_image`].
        on_truncated: what to do with truncated images, see [`open_record_image`].
        places: where else images may be, see [`open_record_image`].
    """

    images: Images
    max_pixels: int
    on_truncated: OnTruncated = "error"
    places: ImagePlaces = NO_PLACES


@dataclass
class Problems:
    """Broken records by kind of problem: the number of them, and a description of the first one."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, file: str, index: int, problem: RecordProblem) -> None:
        """
        Count one broken record.

        Args:
            file: the file of the record.
            index: the index of the record in the file.
            problem: what is wrong with it.
        """
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        self.first.setdefault(problem.kind, describe(file, index, problem))


@dataclass
class EntryReport:
    """
    The result of checking one entry of a mixture.

    Attributes:
        name: the name of the entry.
        strategy: its sampling strategy.
        error: why the entry cannot be used: a file is missing or unreadable, or has too few records.
        files: the number of its files.
        size: the bytes of its files.
        records: the number of records in its files.
        taken: the number of records that the sampling strategy selects, broken ones included.
        without_image: the number of valid records without an image.
        with_image: the number of valid records with an image.
        decoded: the number of images that were decoded, broken ones included.
        problems: the broken records.
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
        """Whether the entry can be used and has no broken records."""
        return self.error is None and not self.problems.counts


def check_entry(entry: MixtureEntry, cache: Path, checks: ImageChecks, progress: bool = True) -> EntryReport:
    """
    Check every record of an entry, selected or not, and its image.

    Args:
        entry: the entry of the mixture.
        cache: the folder for indexes. Training reuses them.
        checks: what to check about images.
        progress: whether to show a progress bar on the standard error if it is a terminal.

    Returns:
        The report.
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
    """Choose the records of each source whose images are decoded. A sample is the same each time."""
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
        except RecordProblem:  # already counted by the index
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
