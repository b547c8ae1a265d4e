"""The end of a task: it writes shards for training mixtures (tar or Parquet), its rejected records, and their
counts.
"""

import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fusion_hf.common.outputs import atomic_file, json_bytes, remove_draft, write_atomically
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.record_documents import USAGE, record_of, task_file
from fusion_hf.synthesis.run_config import RunFolders
from fusion_hf.synthesis.summary import Summary
from fusion_hf.synthesis.synth_record import SynthRecord

REJECTED, SUMMARIES = "rejected", "summaries"
IMAGE_SUFFIX, RECORD_SUFFIX = ".png", ".json"
MODE = 0o644
ROWS = 256  # rows of a row group, whose images are in memory at once


class TarShard:
    """
    A tar archive with `ID.json` and `ID.png` for each record, without times and owners.

    Args:
        stream: the file to write.
    """

    def __init__(self, stream: BinaryIO):
        self.tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, record: SynthRecord, image: bytes) -> None:
        """
        Add a record.

        Args:
            record: the record.
            image: the bytes of its PNG.
        """
        fields = {**record.training_record(), "image": record.id + IMAGE_SUFFIX, "category": record.category}
        self._member(record.id + RECORD_SUFFIX, json_bytes(fields))
        self._member(record.id + IMAGE_SUFFIX, image)
        self.tar.members.clear()  # type: ignore[attr-defined]  # otherwise all names stay in memory

    def _member(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), MODE
        self.tar.addfile(info, BytesIO(content))

    def close(self) -> None:
        """Finish the archive."""
        self.tar.close()


class ParquetShard:
    """
    A Parquet file with a row for each record, and images as `datasets.Image` stores them.

    Args:
        stream: the file to write.
    """

    def __init__(self, stream: BinaryIO):
        import pyarrow as pa
        import pyarrow.parquet

        turn = pa.struct([("from", pa.string()), ("value", pa.string())])
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"id": pa.string(), "category": pa.string(), "image": image, "conversations": pa.list_(turn)}
        self.schema = pa.schema(columns)
        self.writer = pyarrow.parquet.ParquetWriter(stream, self.schema, compression="zstd")
        self.rows: list[dict[str, Any]] = []

    def add(self, record: SynthRecord, image: bytes) -> None:
        """
        Add a record.

        Args:
            record: the record.
            image: the bytes of its PNG.
        """
        cell = {"bytes": image, "path": record.id + IMAGE_SUFFIX}
        self.rows.append({**record.training_record(), "image": cell, "category": record.category})
        if len(self.rows) == ROWS:
            self._write()

    def close(self) -> None:
        """Write the remaining rows and finish the file."""
        self._write()
        self.writer.close()

    def _write(self) -> None:
        import pyarrow as pa

        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows = []


RecordShard: TypeAlias = TarShard | ParquetShard  # equal records give equal bytes
SHARDS: dict[str, type[RecordShard]] = {"tar": TarShard, "parquet": ParquetShard}


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """
    Yield the records of a shard in order, with the bytes of their PNG.

    Args:
        path: the shard.
    """
    if path.suffix == ".tar":
        with tarfile.open(path, "r:") as tar:
            record: dict[str, Any] = {}
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None, "a shard holds only files"
                if member.name.endswith(RECORD_SUFFIX):
                    record = json.loads(content.read())
                else:
                    yield record, content.read()
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS):
            for row in batch.to_pylist():
                yield row, row["image"]["bytes"]


def stage_folder(stage: str) -> str:
    """
    Return the name of the folder with the shards of a training stage, which lies next to its mixture.

    Args:
        stage: the training stage.
    """
    return f"stage{stage}"


class WriteRecords(PipelineStep):
    """
    Write the records of a task in order.

    All files are renamed together at the end, so that a task that was killed starts again.

    Args:
        folders: the folders of the run.
        kind: `tar` or `parquet`.
    """

    name = "Write records"
    type = "Writer"

    def __init__(self, folders: RunFolders, kind: str):
        super().__init__()
        self.folders, self.kind = folders, kind

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        summary = Summary()
        shards: dict[str, RecordShard] = {}
        rejects = task_file(self.folders.data / REJECTED, rank)
        remove_draft(rejects)
        with ExitStack() as files:
            rejected: BinaryIO | None = None  # a task without rejected records writes no such file
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
        write_atomically(self.folders.work / SUMMARIES / f"{rank:05d}.json", json_bytes(summary.to_dict()))

    def _open(self, files: ExitStack, stage: str, rank: int) -> RecordShard:
        path = self.folders.data / stage_folder(stage) / f"{rank:05d}.{self.kind}"
        stream: BinaryIO = files.enter_context(atomic_file(path))
        return SHARDS[self.kind](stream)

    def _image(self, document: Document, record: SynthRecord) -> bytes:
        if document.media:
            return document.media[0].media_bytes
        return (self.folders.images / record.images[0]).read_bytes()
