"""Where records start: captions that are distributed to tasks, which determines everything after it, or drawn
records.
"""

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
UNUSABLE = "unusable.jsonl"  # entries that are not valid captions
ID_DIGITS = 16


def spread_categories(shares: Mapping[str, float]) -> Iterator[str]:
    """
    Yield names of categories without end, such that each has its share of any number of them to within one.

    Args:
        shares: the share of each category. Their sum is 1.
    """
    behind = dict.fromkeys(shares, 0.0)
    while True:
        for name, share in shares.items():
            behind[name] += share
        chosen = max(behind, key=behind.__getitem__)
        behind[chosen] -= 1
        yield chosen


def new_record(caption: str, category: str, seed: int, number: int) -> SynthRecord:
    """
    Make the record of a caption. Its id and seed depend on the seed of the run, its number and the caption.

    Args:
        caption: the caption.
        category: the name of its category.
        seed: the seed of the run.
        number: the number of the caption.
    """
    digest = hash_prompt(f"{seed}/{number}/{category}/{caption}")
    identity = f"{category.lower()}-{digest[:ID_DIGITS]}"
    return SynthRecord(identity, category, caption, random.Random(digest).randrange(MAX_SEED))


def task_size(records: int, tasks: int, task: int) -> int:
    """
    Return the number of records of a task. The sizes of two tasks differ by at most one.

    Args:
        records: the number of all records.
        tasks: the number of tasks.
        task: the number of the task.
    """
    return records // tasks + (task < records % tasks)


class PlanRecords(PipelineStep):
    """
    Read the captions and distribute their records to the tasks, with a file for each. One task does this for all.

    If the pool has fewer captions than the run has records, there are fewer records. The plan is complete when all
    files exist.

    Args:
        config: the configuration of the run.
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
                # the filter reads the caption and names the earlier one by its id
                problem = duplicates.check(SynthRecord(f"caption {number}", "", caption.text, self.config.seed))
            if problem is None:
                yield caption.text
                continue
            self.stat_update("unusable")
            unusable.write(json_bytes({"caption": number, "reason": problem}))


class DrawRecords(PipelineStep):
    """
    Draw the records of a task, each with its image in the document.

    Args:
        config: the configuration of the run.
    """

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
        # over all tasks together, since a task of few records lacks some categories
        categories = islice(spread_categories(config.shares), first, first + count)
        for position, category in enumerate(categories):
            with self.track_time():
                drawn = draw(category, config.seed, first + position)
                image = drawn.images[0] if len(drawn.images) == 1 else compose_pair(*drawn.images)
                content = encode_png(image, {MODEL: PROCEDURAL, SEED: str(config.seed)})
            record = replace(drawn.record, images=(f"{drawn.record.id}.png",))
            yield to_document(record, position, rank, [content])
