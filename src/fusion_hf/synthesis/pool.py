"""Where records begin: captions that are given to tasks, which decides everything after it, or drawn records."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fusion_hf.common.outputs import atomic_file, json_bytes, write_atomically
from fusion_hf.synthesis.filters.minhash import NearDuplicatesFilter
from fusion_hf.synthesis.image_generation import MODEL, SEED, compose_pair, encode_png
from fusion_hf.synthesis.readers import read_captions
from fusion_hf.synthesis.record_documents import document_line, plan_file, task_file, to_document
from fusion_hf.synthesis.run_config import PROCEDURAL, RunFolders, SynthesisConfig
from fusion_hf.synthesis.structured_answers import MAX_SEED, hash_prompt
from fusion_hf.synthesis.synth_record import SynthRecord

STAGE = "pool"
UNUSABLE = "unusable.jsonl"  # captions that are none
ID_DIGITS = 16


def spread_categories(shares: Mapping[str, float]) -> Iterator[str]:
    """
    Give names without end: after any number of them, each has its share of it to within one.

    Args:
        shares: by name; their sum is 1.
    """
    behind = dict.fromkeys(shares, 0.0)
    while True:
        for name, share in shares.items():
            behind[name] += share
        chosen = max(behind, key=behind.__getitem__)
        behind[chosen] -= 1
        yield chosen


def new_record(caption: str, category: str, seed: int, number: int) -> SynthRecord:
    """Make the record of a caption; its id and seed depend on the run's seed, on its number and on the caption."""
    digest = hash_prompt(f"{seed}/{number}/{category}/{caption}")
    identity = f"{category.lower()}-{digest[:ID_DIGITS]}"
    return SynthRecord(identity, category, caption, random.Random(digest).randrange(MAX_SEED))


def task_size(records: int, tasks: int, task: int) -> int:
    """Count the records of a task: as many as of the others, or one more."""
    return records // tasks + (task < records % tasks)


class PlanRecords(PipelineStep):
    """
    Reads the pool and gives its records to the tasks, a file for each. One task does this for all.

    A pool with fewer captions than the run's records gives fewer. The plan is there when all files are.
    """

    name = "Plan records"
    type = "Reader"

    def __init__(self, config: SynthesisConfig):
        super().__init__()
        self.config = config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        config, folders = self.config, RunFolders(self.config.output)
        folder, tasks = folders.stage(STAGE), config.executor.tasks
        counts = [0] * tasks
        with atomic_file(folder / UNUSABLE) as unusable:
            categories, captions = spread_categories(config.shares), enumerate(self._captions(unusable))
            for task in range(tasks):
                with atomic_file(task_file(folder, task)) as stream:
                    some = islice(captions, task_size(config.records, tasks, task))
                    for position, (number, caption) in enumerate(some):
                        record = new_record(caption, next(categories), config.seed, number)
                        document = to_document(record, position, task)
                        stream.write(document_line(document))
                        counts[task] += 1
                        self.stat_update("records")
                        yield document
        write_atomically(plan_file(folders.work), json_bytes({"records": counts}))

    def _captions(self, unusable: BinaryIO) -> Iterator[str]:
        pool = self.config.pool
        assert pool is not None, "checked by SynthesisConfig"
        duplicates = NearDuplicatesFilter() if pool.near_duplicates else None
        for number, caption in enumerate(read_captions(pool)):
            problem = caption.problem
            if problem is None and duplicates is not None:
                # the filter looks at the caption and names the one before by its id
                problem = duplicates.check(SynthRecord(f"caption {number}", "", caption.text, self.config.seed))
            if problem is None:
                yield caption.text
                continue
            self.stat_update("unusable")
            unusable.write(json_bytes({"caption": number, "reason": problem}))


class DrawRecords(PipelineStep):
    """Draws the records of a task, each with its image in the document."""

    name = "Draw records"
    type = "Reader"

    def __init__(self, config: SynthesisConfig):
        super().__init__()
        self.config = config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        from fusion_hf.synthesis.procedural import draw

        config = self.config
        first = sum(task_size(config.records, world_size, task) for task in range(rank))
        count = task_size(config.records, world_size, rank)
        # of all tasks together: a task of a few records has not all categories
        categories = islice(spread_categories(config.shares), first, first + count)
        for position, category in enumerate(categories):
            with self.track_time():
                drawn = draw(category, config.seed, first + position)
                image = drawn.images[0] if len(drawn.images) == 1 else compose_pair(*drawn.images)
                content = encode_png(image, {MODEL: PROCEDURAL, SEED: str(config.seed)})
            record = replace(drawn.record, images=(f"{drawn.record.id}.png",))
            yield to_document(record, position, rank, [content])
