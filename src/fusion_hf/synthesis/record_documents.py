"""Records as datatrove carries them, and on disk between two stages: a task reads what the same task wrote."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document, Media, MediaType
from datatrove.pipeline.base import PipelineStep

from fusion_hf.common.outputs import atomic_file, json_bytes
from fusion_hf.synthesis.synth_record import SynthRecord

RECORD, POSITION, TASK, USAGE = "record", "position", "task", "usage"  # keys of a document's metadata
SUFFIX = ".jsonl"


def to_document(record: SynthRecord, position: int, task: int, images: Iterable[bytes] = ()) -> Document:
    """
    Put a record into a document of datatrove.

    Args:
        position: of the record in its task; the order of its output.
        images: PNG files that are in no folder.
    """
    media = [
        Media(id=name, type=MediaType.IMAGE, url="", media_bytes=content)
        for name, content in zip(record.images, images, strict=False)
    ]
    metadata = {RECORD: record.to_dict(), POSITION: position, TASK: task, USAGE: {}}
    return Document(text=record.caption, id=record.id, media=media, metadata=metadata)


def record_of(document: Document) -> SynthRecord:
    """Take the record that a document carries."""
    return SynthRecord.from_dict(document.metadata[RECORD])


def put_record(document: Document, record: SynthRecord) -> None:
    """Let a document carry a changed record."""
    document.metadata[RECORD] = record.to_dict()


def plan_file(work: Path) -> Path:
    """Name the file with the number of records of each task."""
    return work / "plan.json"


def task_file(folder: Path, task: int) -> Path:
    """Name the file that a task writes as a whole."""
    return folder / f"{task:05d}{SUFFIX}"


class ReadStage(PipelineStep):
    """
    The records that this task of an earlier stage wrote, in their order.

    A file of a stage that makes requests holds a chunk of records in the order in which they were answered. They are
    sorted here, so that no more than a chunk is in memory.

    Raises:
        RuntimeError: if one of them is missing or there twice.
    """

    name = "Read stage"
    type = "Reader"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        whole, chunks = task_file(self.folder, rank), (self.folder / f"{rank:05d}").glob(f"*{SUFFIX}")
        files = [whole] if whole.exists() else sorted(chunks, key=lambda path: int(path.stem))
        position = 0
        for path in files:
            for document in sorted(map(_parse, path.open("rb")), key=lambda document: document.metadata[POSITION]):
                if document.metadata[POSITION] != position:
                    raise RuntimeError(f"record {position} of task {rank} is not where it belongs in {path}")
                position += 1
                self.stat_update("records")
                yield document
        expected = json.loads(plan_file(self.folder.parent).read_bytes())["records"][rank]
        if position != expected:
            raise RuntimeError(f"task {rank} has {position} records in {self.folder}, but {expected} were planned")


def document_line(document: Document) -> bytes:
    """Write a document without its media as a line of JSON."""
    return json_bytes({"text": document.text, "id": document.id, "metadata": document.metadata})


def _parse(line: bytes) -> Document:
    fields = json.loads(line)
    return Document(text=fields["text"], id=fields["id"], metadata=fields["metadata"])


class SaveStage(PipelineStep):
    """Writes the records of a task for the next stage; the file is there when all of them are in it."""

    name = "Save stage"
    type = "Writer"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with atomic_file(task_file(self.folder, rank)) as stream:
            for document in data:
                stream.write(document_line(document))
                yield document
