"""The last step of a task: its shards, its rejected records, and a summary of both."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fusion_hf.common.outputs import atomic_file, json_bytes, remove_draft, write_atomically
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.record_documents import USAGE, record_of, task_file
from fusion_hf.synthesis.shards import SHARDS, RecordShard
from fusion_hf.synthesis.summary import Summary
from fusion_hf.synthesis.synth_record import SynthRecord

REJECTED, SUMMARIES = "rejected", "summaries"


def stage_folder(stage: str) -> str:
    """Name the folder of a training stage's shards, beside its mixture."""
    return f"stage{stage}"


class WriteRecords(PipelineStep):
    """
    Writes the records of a task in their order; all files get their names together at the end, so that a task that was
    killed begins anew.

    Args:
        data: folder of the finished data.
        work: folder of the run.
        images: folder of the images that are not in the documents.
        kind: `tar` or `parquet`.
    """

    name = "Write records"
    type = "Writer"

    def __init__(self, data: Path, work: Path, images: Path, kind: str):
        super().__init__()
        self.data, self.work, self.images, self.kind = data, work, images, kind

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        summary = Summary()
        shards: dict[str, RecordShard] = {}
        rejects = task_file(self.data / REJECTED, rank)
        remove_draft(rejects)
        with ExitStack() as files:
            rejected: BinaryIO | None = None  # a task that rejects nothing leaves no file
            for document in data:
                record = record_of(document)
                summary.add(record, document.metadata[USAGE])
                if record.rejection is not None:
                    if rejected is None:
                        rejected = files.enter_context(atomic_file(rejects))
                    rejected.write(json_bytes(record.to_dict()))
                else:
                    stage = load_categories()[record.category].stage
                    if stage not in shards:
                        shards[stage] = self._open(files, stage, rank)
                    shards[stage].add(record, self._image(document, record))
                self.stat_update("rejected" if record.rejection is not None else "written")
                yield document
            for shard in shards.values():
                shard.close()
        write_atomically(self.work / SUMMARIES / f"{rank:05d}.json", json_bytes(summary.to_dict()))

    def _open(self, files: ExitStack, stage: str, rank: int) -> RecordShard:
        path = self.data / stage_folder(stage) / f"{rank:05d}.{self.kind}"
        stream: BinaryIO = files.enter_context(atomic_file(path))
        return SHARDS[self.kind](stream)

    def _image(self, document: Document, record: SynthRecord) -> bytes:
        if document.media:
            return document.media[0].media_bytes
        return (self.images / record.images[0]).read_bytes()
