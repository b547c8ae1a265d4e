"""Tar shards in the WebDataset layout: `NAME.json` or `NAME.txt` next to `NAME.jpg` (or .png, ...)."""

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from fusion_hf.common.errors import InputError
from fusion_hf.data.record_layouts import COMPLETION, PROMPT, has_turns
from fusion_hf.data.record_parsing import FileSpan, Raw, RecordProblem, parse_json_object
from fusion_hf.data.sources import MAX_RECORD_BYTES, FileSource, SourceItem

RECORD_SUFFIX, CAPTION_SUFFIX = "json", "txt"
CAPTION_QUESTION = "Describe the image."  # the question that a caption answers
MAX_HEADER_BYTES = 2**20  # limit of long names and pax fields, which tarfile reads into memory
IMAGE_SUFFIXES = frozenset(("bmp", "gif", "jp2", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"))
NO_PLACE = (0, 0, 0, 0)
TYPE_BYTE = 156  # position of the type in a header
EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")


class TarMember(NamedTuple):
    """
    A file in a tar archive.

    Attributes:
        name: its path up to the first dot of the last component, which is the name of the record.
        suffix: the rest of the path, without the dot.
        offset: the position of its content in bytes.
        size: the size of its content in bytes.
    """

    name: str
    suffix: str
    offset: int
    size: int


class BoundedTarInfo(tarfile.TarInfo):
    """A member whose extended header, if it has one, is limited in size."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "BoundedTarInfo":
        stream = archive.fileobj
        assert stream is not None  # the archive is open
        begin = stream.tell()
        header = stream.read(tarfile.BLOCKSIZE)
        stream.seek(begin)
        if len(header) == tarfile.BLOCKSIZE and header[TYPE_BYTE : TYPE_BYTE + 1] in EXTENDED:
            size = cls.frombuf(header, archive.encoding or "utf-8", archive.errors or "strict").size
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header must have at most {MAX_HEADER_BYTES} bytes, got {size}")
        return super().fromtarfile(archive)


class TarRecords(FileSource):
    """
    An uncompressed tar archive. Images are read in place, and nothing is unpacked or copied.

    The image of a record is the one next to it. A path in the record itself is ignored. If a record has no turns or no
    .json file, the caption next to it answers `CAPTION_QUESTION`. The `offset` of a caption is negative.
    """

    kind: ClassVar[str] = "TarShard"
    place_names = ("offset", "size", "image_offset", "image_size")

    def scan(self) -> Iterator[SourceItem]:
        with self.path.open("rb") as stream:
            for name, group in groupby(self._members(), key=lambda member: member.name):
                members = list(group)
                records = [member for member in members if member.suffix == RECORD_SUFFIX]
                captions = [member for member in members if member.suffix == CAPTION_SUFFIX]
                images = [member for member in members if member.suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
                if not records and not images:
                    continue
                done = members[-1].offset + members[-1].size
                if (problem := _count_problem(name, records or captions, images)) is not None:
                    yield SourceItem(problem, NO_PLACE, done)
                    continue
                image = (images[0].offset, images[0].size) if images else (0, 0)
                raw: Raw = {}
                if records:
                    place = (records[0].offset, records[0].size, *image)
                    raw = self._record(stream, place)
                if len(captions) == 1 and isinstance(raw, dict) and not has_turns(raw):
                    place = (-captions[0].offset, captions[0].size, *image)
                    raw = self._record(stream, place)
                yield SourceItem(raw, place, done)

    def read(self, index: int, place: tuple[int, ...]) -> Raw:
        offset, size = place[:2]
        return self._with_image(super().read(index, (abs(offset), size)), place)

    def _record(self, stream: BinaryIO, place: tuple[int, ...]) -> Raw:
        offset, size = place[:2]
        if size > MAX_RECORD_BYTES:
            return RecordProblem("unreadable", f"the record must have at most {MAX_RECORD_BYTES} bytes, got {size}")
        stream.seek(abs(offset))
        return self._with_image(stream.read(size), place)

    def _with_image(self, raw: Raw, place: tuple[int, ...]) -> Raw:
        try:
            fields = _caption_fields(raw) if place[0] < 0 else parse_json_object(raw)
        except RecordProblem as problem:
            return problem
        offset, size = place[2:]
        if size:
            return {**fields, "image": FileSpan(self.path, offset, size), "images": None}
        if fields.get("image") is not None or fields.get("images"):
            identity = None if fields.get("id") is None else str(fields["id"])
            return RecordProblem("missing image", "the archive has no image next to it", identity)
        return fields

    def _members(self) -> Iterator[TarMember]:
        """Yield the files of the archive in order. Raise an InputError if it is not a complete tar archive."""
        try:
            with tarfile.open(self.path, "r:", errors="surrogateescape", tarinfo=BoundedTarInfo) as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # otherwise all names stay in memory
                    if info.isreg() and not info.issparse():
                        folder, slash, base = info.name.rpartition("/")
                        stem, _, suffix = base.partition(".")
                        yield TarMember(f"{folder}{slash}{stem}", suffix.lower(), info.offset_data, info.size)
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(f"data: {self.name} is not a complete, uncompressed tar archive ({error}).") from error
        with self.path.open("rb") as stream:  # tarfile treats any damaged header as the end
            stream.seek(end)
            block = stream.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
            raise InputError(
                f"data: {self.name} is not a complete, uncompressed tar archive: no end mark at byte {end}."
            )


def _count_problem(name: str, records: list[TarMember], images: list[TarMember]) -> RecordProblem | None:
    identity = name.encode("utf-8", "replace").decode()
    if len(records) != 1:
        members = f".{RECORD_SUFFIX} or .{CAPTION_SUFFIX} file"
        return RecordProblem("shape", f"{identity!r} must have one {members}, got {len(records)}", identity)
    if len(images) > 1:
        return RecordProblem("several images", f"{identity!r} must have one image, got {len(images)}", identity)
    return None


def _caption_fields(raw: Raw) -> dict[str, Any]:
    if not isinstance(raw, bytes):
        return parse_json_object(raw)
    try:
        caption = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise RecordProblem("unreadable", f"not valid UTF-8 ({error.reason} at byte {error.start})") from error
    return {PROMPT: CAPTION_QUESTION, COMPLETION: caption}


def find_shards(folder: Path) -> list[Path]:
    """
    List the tar archives of a folder, sorted by name.

    Args:
        folder: the folder.
    """
    return sorted(path for path in folder.glob("*.tar") if path.is_file())
