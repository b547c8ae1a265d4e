"""Measure the precision and recall of every filter on drawn records with known faults and without."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from filter_faults import FAULTS, Case
from filter_lookalikes import LOOKALIKES

from fusion_hf.synthesis.category import Category, load_categories
from fusion_hf.synthesis.filters import RULES, Filter, build_filters
from fusion_hf.synthesis.filters.text import DuplicateQuestionsFilter, TurnCountFilter
from fusion_hf.synthesis.procedural.drawn_records import plan
from fusion_hf.synthesis.synth_record import SynthRecord

MOST_TRIES = 40  # maximum number of drawn records until a change is possible
ACROSS = ("duplicate_questions", "near_duplicates")  # filters that compare records
FILTERS = (TurnCountFilter.name, *RULES, *ACROSS)


@dataclass
class CaseFigures:
    """How many records of one kind a filter rejected."""

    name: str
    fault: bool
    records: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class FilterFigures:
    """The figures of a filter on records that it must reject, and on records that it must keep."""

    name: str
    cases: tuple[CaseFigures, ...]

    def _sum(self, fault: bool, field: str) -> int:
        return sum(getattr(case, field) for case in self.cases if case.fault == fault)

    @property
    def recall(self) -> float:
        """Share of the faulty records that it rejects."""
        return self._sum(True, "rejected") / self._sum(True, "records")

    @property
    def precision(self) -> float:
        """Share of its rejections that are right."""
        right = self._sum(True, "rejected")
        return right / (right + self._sum(False, "rejected"))

    @property
    def kept(self) -> float:
        """Share of the sound records that it keeps."""
        return 1 - self._sum(False, "rejected") / self._sum(False, "records")

    def to_dict(self) -> dict[str, Any]:
        """Convert the figures to JSON values."""
        shares = {name: getattr(self, name) for name in ("precision", "recall", "kept")}
        return {"name": self.name, **shares, "cases": [asdict(case) for case in self.cases]}


def fault_kinds(category: str) -> list[str]:
    """List the faults that can be put into records of a category."""
    settings = load_categories()[category]
    return [case.name for case in FAULTS if _concerns(case, settings) and _changed(case, settings, 0, 0) is not None]


def broken(category: str, kind: str, seed: int, index: int) -> SynthRecord:
    """
    Make a drawn record with a known fault, whose name says which filter must find it.

    Raises:
        ValueError: if records of the category cannot have this fault.
    """
    settings = load_categories()[category]
    for case in FAULTS:
        if case.name == kind and _concerns(case, settings):
            changed = _changed(case, settings, seed, index)
            if changed is not None:
                return changed[1]
    raise ValueError(f"`kind` must be one of {', '.join(fault_kinds(category))} for {category}, got {kind!r}.")


def _concerns(case: Case, category: Category) -> bool:
    return case.rule in ("", TurnCountFilter.name, *ACROSS, *category.rules)


def _changed(case: Case, category: Category, seed: int, index: int) -> tuple[SynthRecord, SynthRecord] | None:
    """Return a drawn record and its changed version, or None if the case does not apply to it."""
    rng = random.Random(f"truth/{category.name}/{case.name}/{seed}/{index}")
    for attempt in range(MOST_TRIES):
        record = plan(category.name, seed, index * MOST_TRIES + attempt).record
        changed = case.change(record, rng)
        if changed is not None:
            return record, changed
    return None


def measure(count: int, seed: int = 0, names: Sequence[str] = FILTERS) -> list[FilterFigures]:
    """
    Apply filters to `count` records of every kind of every category that has them.

    Raises:
        ImportError: if datatrove is missing, which one filter requires.
    """
    figures: dict[str, dict[str, CaseFigures]] = {name: {} for name in names}
    for category in load_categories().values():
        filters = {rule.name: rule for rule in build_filters(category)}
        for fault, cases in ((True, FAULTS), (False, LOOKALIKES)):
            for case in cases:
                concerned = {case.rule} if case.rule else {*filters, *ACROSS}
                concerned &= set(names)
                if not concerned or not _concerns(case, category):
                    continue
                for before, changed in _all_changed(case, category, seed, count):
                    for name in concerned:
                        found = figures[name].setdefault(case.name, CaseFigures(case.name, fault))
                        found.records += 1
                        found.rejected += _rejects(name, filters, before, changed, bool(case.rule))
    return [FilterFigures(name, tuple(cases.values())) for name, cases in figures.items()]


def _all_changed(case: Case, category: Category, seed: int, count: int) -> Iterator[tuple[SynthRecord, SynthRecord]]:
    for index in range(count):
        changed = _changed(case, category, seed, index)
        if changed is None:
            return
        yield changed


def _rejects(name: str, filters: dict[str, Filter], before: SynthRecord, changed: SynthRecord, seen: bool) -> bool:
    """Return whether a filter rejects a record. With `seen`, it has processed the unchanged record before."""
    if name not in ACROSS:
        return filters[name].check(changed) is not None
    rule = _across(name)
    if seen:
        rule.check(before)
    return rule.check(changed) is not None


def _across(name: str) -> Filter:
    if name == DuplicateQuestionsFilter.name:
        return DuplicateQuestionsFilter()
    from fusion_hf.synthesis.filters.minhash import NearDuplicatesFilter  # needs datatrove

    return NearDuplicatesFilter()
