"""The procedural backend as a step: records that the project draws itself, without any model."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fusion_hf.synthesis.documents import to_document
from fusion_hf.synthesis.images import encode_png
from fusion_hf.synthesis.pool import spread_categories, task_size


class DrawRecords(PipelineStep):
    """
    Draws the records of a task, each with its pictures in the document.

    Args:
        records: of all tasks.
    """

    name = "Draw records"
    type = "Reader"

    def __init__(self, shares: Mapping[str, float], records: int, seed: int):
        super().__init__()
        self.shares, self.records, self.seed = dict(shares), records, seed

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        from fusion_hf.synthesis.procedural import draw

        first = sum(task_size(self.records, world_size, task) for task in range(rank))
        count = task_size(self.records, world_size, rank)
        for position, category in enumerate(islice(spread_categories(self.shares), count)):
            with self.track_time():
                drawn = draw(category, self.seed, first + position)
            pictures = [encode_png(picture, {}) for picture in drawn.pictures]
            yield to_document(drawn.record, position, rank, pictures)
