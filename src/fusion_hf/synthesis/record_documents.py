"""Records as datatrove's documents, and on disk between two stages. A task reads what the same task wrote."""

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
        record: the record.
        position: the position of the record in its task, which is the order of its output.
        task: the number of the task.
        images: PNG files that are in no folder.
    """
    media = [
        Media(id=name, type=MediaType.IMAGE, url="", media_bytes=content)
        for name, content in zip(record.images, images, strict=False)
    ]
    metadata = {RECORD: record.to_dict(), POSITION: position, TASK: task, USAGE: {}}
    return Document(text=record.caption, id=record.id, media=media, metadata=metadata)


def record_of(document: Document) -> SynthRecord:
    """
    Return the record of a document.

    Args:
        document: the document.
    """
    return SynthRecord.from_dict(document.metadata[RECORD])


def put_record(document: Document, record: SynthRecord) -> None:
    """
    Replace the record of a document.

    Args:
        document: the document, changed in place.
        record: the record.
    """
    document.metadata[RECORD] = record.to_dict()


def plan_file(work: Path) -> Path:
    """
    Return the file with the number of records of each task.

    Args:
        work: the folder for intermediate files.
    """
    return work / "plan.json"


def task_file(folder: Path, task: int) -> Path:
    """
    Return the file that a task writes atomically.

    Args:
        folder: the folder of the stage.
        task: the number of the task.
    """
    return folder / f"{task:05d}{SUFFIX}"


class ReadStage(PipelineStep):
    """
    Read the records that this task wrote in an earlier stage, in order.

    A file of a stage with requests holds a chunk of records in the order of their answers. They are sorted here, so
    that only one chunk is in memory.

    Args:
        folder: the folder of the earlier stage.

    Raises:
        RuntimeError: if a record is missing or repeated.
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
                    raise RuntimeError(f"Record {position} of task {rank} is missing or repeated in {path}.")
                position += 1
                self.stat_update("records")
                yield document
        expected = json.loads(plan_file(self.folder.parent).read_bytes())["records"][rank]
        if position != expected:
            raise RuntimeError(f"Task {rank} must have {expected} records in {self.folder}, got {position}.")


def document_line(document: Document) -> bytes:
    """
    Write a document without its media as a line of JSON.

    Args:
        document: the document.
    """
    return json_bytes({"text": document.text, "id": document.id, "metadata": document.metadata})


def _parse(line: bytes) -> Document:
    fields = json.loads(line)
    return Document(text=fields["text"], id=fields["id"], metadata=fields["metadata"])


class SaveStage(PipelineStep):
    """
    Write the records of a task for the next stage. The file appears only when it is complete.

    Args:
        folder: the folder of the stage.
    """

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
