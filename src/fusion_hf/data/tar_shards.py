"""Tar shards in the WebDataset layout: `NAME.json` or `NAME.txt` and, beside it, `NAME.jpg` (or .png, ...)."""

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
CAPTION_QUESTION = "Describe the image."  # of a caption, which answers it
MAX_HEADER_BYTES = 2**20  # of a long name, or of pax fields: tarfile reads them whole
IMAGE_SUFFIXES = frozenset(("bmp", "gif", "jp2", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"))
NO_PLACE = (0, 0, 0, 0)
TYPE_BYTE = 156  # of a header
EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")


class TarMember(NamedTuple):
    """A file in a tar. `name` is its path up to the first dot of its last part, which is the record's."""

    name: str
    suffix: str
    offset: int
    size: int


class BoundedTarInfo(tarfile.TarInfo):
    """A member whose extended header, if it has one, fits into memory."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "BoundedTarInfo":
        stream = archive.fileobj
        assert stream is not None  # it is open
        begin = stream.tell()
        header = stream.read(tarfile.BLOCKSIZE)
        stream.seek(begin)
        if len(header) == tarfile.BLOCKSIZE and header[TYPE_BYTE : TYPE_BYTE + 1] in EXTENDED:
            size = cls.frombuf(header, archive.encoding or "utf-8", archive.errors or "strict").size
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes; allowed: {MAX_HEADER_BYTES}")
        return super().fromtarfile(archive)


class TarRecords(FileSource):
    """
    An uncompressed tar. Its images are read where they lie: nothing is unpacked or copied.

    The image of a record is the one beside it; a path in the record itself is not followed. A record without turns, or
    without a .json, is the caption beside it, as `CAPTION_QUESTION` and its answer. The `offset` of a caption is
    negative.
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
            return RecordProblem("unreadable", f"it has {size} bytes; allowed: {MAX_RECORD_BYTES}")
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
            return RecordProblem("missing image", "the tar has no image beside it", identity)
        return fields

    def _members(self) -> Iterator[TarMember]:
        """Its files, in their order; an InputError for what is no tar, or not a whole one."""
        try:
            with tarfile.open(self.path, "r:", errors="surrogateescape", tarinfo=BoundedTarInfo) as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or the names of all stay in memory
                    if info.isreg() and not info.issparse():
                        folder, slash, base = info.name.rpartition("/")
                        stem, _, suffix = base.partition(".")
                        yield TarMember(f"{folder}{slash}{stem}", suffix.lower(), info.offset_data, info.size)
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(f"data: {self.name} is no whole, uncompressed tar ({error}).") from error
        with self.path.open("rb") as stream:  # tarfile takes any damaged header for the end
            stream.seek(end)
            block = stream.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
            raise InputError(f"data: {self.name} is no whole, uncompressed tar: it has no end at byte {end}.")


def _count_problem(name: str, records: list[TarMember], images: list[TarMember]) -> RecordProblem | None:
    identity = name.encode("utf-8", "replace").decode()
    if len(records) != 1:
        members = f".{RECORD_SUFFIX} or .{CAPTION_SUFFIX} members"
        return RecordProblem("shape", f"{identity!r} has {len(records)} {members}; allowed: one", identity)
    if len(images) > 1:
        return RecordProblem("several images", f"{identity!r} has {len(images)} images; allowed: one", identity)
    return None


def _caption_fields(raw: Raw) -> dict[str, Any]:
    if not isinstance(raw, bytes):
        return parse_json_object(raw)
    try:
        caption = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise RecordProblem("unreadable", f"it is no UTF-8 ({error.reason} at byte {error.start})") from error
    return {PROMPT: CAPTION_QUESTION, COMPLETION: caption}


def find_shards(folder: Path) -> list[Path]:
    """List the tars of a folder, in the order of their names."""
    return sorted(path for path in folder.glob("*.tar") if path.is_file())
