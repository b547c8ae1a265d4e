"""Files of records: what is read from beginning to end, and read again at any place."""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from fusion_hf.common.errors import InputError
from fusion_hf.data.record_parsing import IMAGE_KEY, Raw, RecordProblem

MAX_RECORD_BYTES = 2**26  # memory stays bounded in a file that has no line ends, or is no JSON
CHUNK_BYTES = 2**22
WHITE_SPACE = " \t\r\n"


class SourceItem(NamedTuple):
    """A record as it is stored, numbers to find it again by, and how much of the source has been read with it."""

    raw: Raw
    place: tuple[int, ...]
    done: int


class RecordStream(ABC):
    """
    Records in their order.

    Attributes:
        name: for errors.
        root: a resolved folder, of image paths.
        image_key: the field of a record that holds its image.
    """

    name: str
    root: Path
    image_key: str

    @abstractmethod
    def scan(self) -> Iterator[SourceItem]:
        """Give all records, in memory that does not grow with them."""


class RecordSource(RecordStream):
    """
    Records that are found again.

    Attributes:
        kind: in names of indexes on disk, so it stays as it is.
        place_names: of the numbers by which `read` finds a record.
        total, unit: how much there is to read, for a progress bar.
        size: bytes.
    """

    kind: ClassVar[str]
    place_names: tuple[str, ...]
    total: int
    unit: str
    size: int

    @abstractmethod
    def read(self, index: int, place: tuple[int, ...]) -> Raw:
        """Read the record `index`, whose place `scan` gave."""

    @abstractmethod
    def state(self) -> str:
        """Return a text that changes when the records do."""

    def fingerprint(self, version: int) -> str:
        """Name an index of the present records."""
        parts = (str(version), self.kind, self.image_key, self.state())
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def file_state(path: Path) -> str:
    """
    Raises:
        InputError: if there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"data: {path} cannot be read ({error.strerror}).") from error
    return f"{path}\n{status.st_size}\n{status.st_mtime_ns}"


class FileSource(RecordSource):
    """A file in which a record is a span of bytes: nothing is copied into the cache but where it begins and ends."""

    place_names: tuple[str, ...] = ("offset", "size")
    unit = "B"

    def __init__(self, path: Path, root: Path, image_key: str = IMAGE_KEY):
        self.path = path.resolve()
        self.name = str(path)
        self.root = root
        self.image_key = image_key
        self.at_opening = file_state(self.path)
        self.total = self.size = self.path.stat().st_size
        if self.size == 0:
            raise InputError(f"data: {path} is empty.")

    def state(self) -> str:
        return self.at_opening

    def read(self, index: int, place: tuple[int, ...]) -> Raw:
        """
        Raises:
            InputError: if the file is no longer as it was when it was opened.
        """
        offset, size = place[:2]
        if file_state(self.path) != self.at_opening:
            raise InputError(f"data: {self.name} was changed while it was in use; start anew.")
        # not through a memory map: its pages would count as this process's, up to the size of the file
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            return stream.read(size)


class JsonLines(FileSource):
    """A record per line; empty lines are none."""

    kind: ClassVar[str] = "JsonLines"

    def scan(self) -> Iterator[SourceItem]:
        offset = 0
        with self.path.open("rb") as stream:
            while line := stream.readline(MAX_RECORD_BYTES + 1):
                if len(line) > MAX_RECORD_BYTES:
                    limit = f"a line of over {MAX_RECORD_BYTES} bytes"
                    raise InputError(f"data: {self.name} has {limit} at byte {offset}; is it no JSON Lines?")
                end = offset + len(line)
                if offset == 0 and line.startswith(codecs.BOM_UTF8):
                    line, offset = line[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                if line.strip():
                    yield SourceItem(line, (offset, len(line)), end)
                offset = end


class JsonArray(FileSource):
    """
    One JSON array of records, also of many gigabytes.

    The standard library's decoder on a moving window is used and not ijson, which reads 200 MB in 0.8 s instead of
    2.2 s (of 9 s that their index takes), but does not tell where a record begins: all would have to be copied.
    """

    kind: ClassVar[str] = "JsonArray"

    def scan(self) -> Iterator[SourceItem]:
        with self.path.open("rb") as stream:
            window = _Window(stream, self.name)
            window.skip_white_space()
            if window.character() != "[":
                begin = repr(window.character())
                advice = "a JSON array; a file with a record per line needs the suffix .jsonl"
                raise InputError(f"data: {self.name} begins with {begin}; allowed: {advice}.")
            window.move(1)
            window.skip_white_space()
            while window.character() != "]":
                value, offset, size = window.value()
                is_record = isinstance(value, dict)
                problem = RecordProblem("shape", f"it is {type(value).__name__}; allowed: a JSON object")
                yield SourceItem(value if is_record else problem, (offset, size), offset + size)
                window.skip_white_space()
                if window.character() == ",":
                    window.move(1)
                    window.skip_white_space()
                elif window.character() != "]":
                    raise window.error("no comma and no end after a record")
            window.move(1)
            window.skip_white_space()
            if window.character():
                raise window.error("more text after the array")


class _Window:
    """The part of a UTF-8 file that is being decoded; `start` is a position in `text`, `offset` the same in bytes."""

    def __init__(self, stream: BinaryIO, name: str):
        self.stream = stream
        self.name = name
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.scan_value = json.JSONDecoder().raw_decode
        self.text, self.start, self.offset, self.ended = "", 0, 0, False
        self.extend()
        if self.text.startswith("\ufeff"):  # a byte order mark
            self.start, self.offset = 1, len(codecs.BOM_UTF8)

    def error(self, detail: str) -> InputError:
        return InputError(f"data: {self.name} is no JSON: {detail}, at byte {self.offset}.")

    def extend(self) -> None:
        """Drop what was read and append more: as much as is there, so that a long record is not scanned often."""
        self.text = self.text[self.start :]
        self.start = 0
        content = self.stream.read(max(CHUNK_BYTES, len(self.text)))
        self.ended = not content
        try:
            self.text += self.decode(content, final=self.ended)
        except UnicodeDecodeError as error:
            position = self.stream.tell() - len(content)
            raise InputError(f"data: {self.name} is no UTF-8 ({error.reason} near byte {position}).") from error

    def character(self) -> str:
        """The next one; empty at the end."""
        while self.start >= len(self.text) and not self.ended:
            self.extend()
        return self.text[self.start : self.start + 1]

    def move(self, count: int) -> None:
        """Forward by ASCII characters."""
        self.start += count
        self.offset += count

    def skip_white_space(self) -> None:
        while (character := self.character()) and character in WHITE_SPACE:
            self.move(1)

    def value(self) -> tuple[Any, int, int]:
        """The JSON value that begins here, and its offset and size in bytes."""
        while True:
            try:
                value, end = self.scan_value(self.text, self.start)
            except (ValueError, RecursionError) as error:
                if self.ended or len(self.text) - self.start > MAX_RECORD_BYTES:
                    raise self.error(f"no value ({error})") from error
                self.extend()
                continue
            if end == len(self.text) and not self.ended:  # a number may go on
                self.extend()
                continue
            written = self.text[self.start : end]
            size = len(written) if written.isascii() else len(written.encode())
            found = value, self.offset, size
            self.start, self.offset = end, self.offset + size
            return found
