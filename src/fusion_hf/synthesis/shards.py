"""Shards of training records with their images, as the training mixtures read them: tar (WebDataset) or Parquet."""

import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from fusion_hf.common.outputs import json_bytes
from fusion_hf.synthesis.synth_record import SynthRecord

IMAGE_SUFFIX, RECORD_SUFFIX = ".png", ".json"
MODE = 0o644
ROWS = 256  # of a row group, whose images are in memory together


class TarShard:
    """`ID.json` and `ID.png` for each record, without times and owners."""

    def __init__(self, stream: BinaryIO):
        self.tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, record: SynthRecord, image: bytes) -> None:
        fields = {**record.training_record(), "image": record.id + IMAGE_SUFFIX, "category": record.category}
        self._member(record.id + RECORD_SUFFIX, json_bytes(fields))
        self._member(record.id + IMAGE_SUFFIX, image)
        self.tar.members.clear()  # type: ignore[attr-defined]  # or the names of all stay in memory

    def _member(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), MODE
        self.tar.addfile(info, BytesIO(content))

    def close(self) -> None:
        self.tar.close()


class ParquetShard:
    """A row for each record, its image as `datasets.Image` stores one."""

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
        cell = {"bytes": image, "path": record.id + IMAGE_SUFFIX}
        self.rows.append({**record.training_record(), "image": cell, "category": record.category})
        if len(self.rows) == ROWS:
            self._write()

    def close(self) -> None:
        self._write()
        self.writer.close()

    def _write(self) -> None:
        import pyarrow as pa

        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows = []


RecordShard: TypeAlias = TarShard | ParquetShard  # the same records give the same bytes
SHARDS: dict[str, type[RecordShard]] = {"tar": TarShard, "parquet": ParquetShard}


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Read the records of a shard with the bytes of their PNG, in their order."""
    if path.suffix == ".tar":
        with tarfile.open(path, "r:") as tar:
            record: dict[str, Any] = {}
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None, "a shard has files alone"
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
