"""What is there of a data set and what is wrong with it, before a run finds out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fusion_hf.common.errors import InputError
from fusion_hf.data.broken_records import describe
from fusion_hf.data.image_files import open_record_image, record_image_path
from fusion_hf.data.index import open_index
from fusion_hf.data.mixture import MixtureEntry
from fusion_hf.data.record_parsing import RecordProblem, parse_record
from fusion_hf.data.sources import RecordSource

Images = Literal["exist", "decode", "none"]


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
    """

    name: str
    strategy: str
    error: str | None = None
    files: int = 0
    size: int = 0
    records: int = 0
    taken: int = 0
    without_image: int = 0
    problems: Problems = field(default_factory=Problems)

    @property
    def fine(self) -> bool:
        return self.error is None and not self.problems.counts


def check_entry(
    entry: MixtureEntry, cache: Path, max_image_pixels: int, images: Images = "exist", progress: bool = True
) -> EntryReport:
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
        for source in sources:
            index = open_index(source, cache)
            report.records += len(index)
            report.without_image += int((index.lengths(range(len(index))) < 0).sum())
            for number in index.broken().tolist() if index.num_broken else ():
                report.problems.add(source.name, number, index.problem(number))
            if images != "none":
                _check_images(report.problems, source, len(index), images, max_image_pixels, progress)
        report.taken = entry.sampling_strategy.count(report.records, entry.name)
    except InputError as error:
        report.error = str(error)
    return report


def _check_images(
    problems: Problems, source: RecordSource, total: int, images: Images, max_image_pixels: int, progress: bool
) -> None:
    items = tqdm(
        source.scan(),
        desc=f"images of {source.name}",
        total=total,
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
            if images == "decode" and record.image is not None:
                open_record_image(record.image, source.root, max_image_pixels)
            elif isinstance(record.image, str):
                record_image_path(record.image, source.root)
        except RecordProblem as problem:
            problem.identity = record.id
            problems.add(source.name, number, problem)
