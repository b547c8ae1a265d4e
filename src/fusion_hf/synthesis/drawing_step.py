"""The procedural backend as a step: records that the project draws itself, without any model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fusion_hf.synthesis.image_generation import MODEL, SEED
from fusion_hf.synthesis.png_files import compose_pair, encode_png
from fusion_hf.synthesis.pool import spread_categories, task_size
from fusion_hf.synthesis.record_documents import to_document

BACKEND = "procedural"


class DrawRecords(PipelineStep):
    """
    Draws the records of a task, each with its image in the document.

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
        # of all tasks together: a task of a few records has not all categories
        categories = islice(spread_categories(self.shares), first, first + count)
        for position, category in enumerate(categories):
            with self.track_time():
                drawn = draw(category, self.seed, first + position)
                image = drawn.images[0] if len(drawn.images) == 1 else compose_pair(*drawn.images)
                content = encode_png(image, {MODEL: BACKEND, SEED: str(self.seed)})
            record = replace(drawn.record, images=(f"{drawn.record.id}.png",))
            yield to_document(record, position, rank, [content])
