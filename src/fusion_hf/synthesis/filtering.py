"""The step that rejects records by the rules of their category, and stores the name and the reason of the filter."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.filters import Filter, build_filters, first_problem
from fusion_hf.synthesis.filters.options import OptionsBalance
from fusion_hf.synthesis.filters.text import DuplicateQuestionsFilter
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.record_documents import TASK, put_record, record_of


@cache
def filters_of(category: str) -> list[Filter]:
    """
    Build the filters of a category, in the order in which they are applied.

    Args:
        category: the name of the category.
    """
    return build_filters(load_categories()[category])


class FilterRecords(PipelineStep):
    """
    Apply the filters of each record's category.

    Rejected records stay in the stream, since they are written to a file of their own. Repeated questions are found
    among the records of one task.

    Args:
        progress: counts the records.
    """

    name = "Filter records"
    type = "Filter"

    def __init__(self, progress: Progress):
        super().__init__()
        self.progress = progress

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        duplicates = DuplicateQuestionsFilter()
        for document in data:
            record = record_of(document)
            record = first_problem(record, [*filters_of(record.category), duplicates])
            if record.rejection is not None:
                self.stat_update(record.rejection.step)
            put_record(document, record)
            self.progress.count(document.metadata[TASK], record)
            yield document
        self.progress.flush()


class BalanceOptions(PipelineStep):
    """
    Reorder the options of multiple-choice questions, so that each letter is right equally often within a task.

    Args:
        seed: the seed of the order.
    """

    name = "Balance options"
    type = "Formatter"

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        balance = OptionsBalance(self.seed + rank)
        for document in data:
            put_record(document, balance.balanced(record_of(document)))
            yield document
