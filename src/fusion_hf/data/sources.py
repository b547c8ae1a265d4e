"""Files of records that are read from start to end once, and then at any position."""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from fusion_hf.common.errors import InputError
from fusion_hf.data.record_parsing import IMAGE_KEY, Raw, RecordProblem

MAX_RECORD_BYTES = 2**26  # bounds the memory for files without line ends and files that are not JSON
CHUNK_BYTES = 2**22
WHITE_SPACE = " \t\r\n"


class SourceItem(NamedTuple):
    """
    A stored record.

    Attributes:
        raw: its content.
        place: the numbers by which the source finds it again.
        done: how much of the source has been read after this record, for a progress bar.
    """

    raw: Raw
    place: tuple[int, ...]
    done: int


class RecordStream(ABC):
    """
    Records that can be read in order.

    Attributes:
        name: the name of the stream, for errors.
        root: the resolved folder of image paths.
        image_key: the field that holds the image.
    """

    name: str
    root: Path
    image_key: str

    @abstractmethod
    def scan(self) -> Iterator[SourceItem]:
        """Yield all records, with memory that does not grow with their number."""


class RecordSource(RecordStream):
    """
    Records with random access.

    Attributes:
        kind: a name that is part of the names of indexes on disk and must not change.
        place_names: the names of the numbers by which `read` finds a record.
        total: how much there is to read, for a progress bar.
        unit: the unit of `total`.
        size: the size in bytes.
    """

    kind: ClassVar[str]
    place_names: tuple[str, ...]
    total: int
    unit: str
    size: int

    @abstractmethod
    def read(self, index: int, place: tuple[int, ...]) -> Raw:
        """
        Read a record.

        Args:
            index: the index of the record.
            place: its place, as `scan` gave it.
        """

    @abstractmethod
    def state(self) -> str:
        """Return a text that changes whenever the records change."""

    def fingerprint(self, version: int) -> str:
        """
        Return the name of an index of the present records.

        Args:
            version: the format version of the index.
        """
        parts = (str(version), self.kind, self.image_key, self.state())
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def file_state(path: Path) -> str:
    """
    Return a text with the path, size and modification time of a file.

    Args:
        path: the file.

    Raises:
        InputError: if the file does not exist.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"data: {path} cannot be read ({error.strerror}).") from error
    return f"{path}\n{status.st_size}\n{status.st_mtime_ns}"


class FileSource(RecordSource):
    """A file in which each record is a span of bytes. The cache holds only the positions of the records."""

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
            raise InputError(f"data: {path} must not be empty.")

    def state(self) -> str:
        return self.at_opening

    def read(self, index: int, place: tuple[int, ...]) -> Raw:
        """
        Read a record.

        Raises:
            InputError: if the file has changed since it was opened.
        """
        offset, size = place[:2]
        if file_state(self.path) != self.at_opening:
            raise InputError(f"data: {self.name} was changed while it was in use. Start again.")
        # a memory map would count towards this process's memory, up to the size of the file
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            return stream.read(size)


class JsonLines(FileSource):
    """A file with one JSON object per line. Empty lines are skipped."""

    kind: ClassVar[str] = "JsonLines"

    def scan(self) -> Iterator[SourceItem]:
        offset = 0
        with self.path.open("rb") as stream:
            while line := stream.readline(MAX_RECORD_BYTES + 1):
                if len(line) > MAX_RECORD_BYTES:
                    limit = f"a line of more than {MAX_RECORD_BYTES} bytes"
                    raise InputError(f"data: {self.name} has {limit} at byte {offset}. Is it a JSON Lines file?")
                end = offset + len(line)
                if offset == 0 and line.startswith(codecs.BOM_UTF8):
                    line, offset = line[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                if line.strip():
                    yield SourceItem(line, (offset, len(line)), end)
                offset = end


class JsonArray(FileSource):
    """
    A file with one JSON array of records, possibly of many gigabytes.

    The decoder of the standard library is applied to a moving window. ijson reads 200 MB in 0.8 s instead of 2.2 s (of
    9 s for their index), but it does not report the position of records, so all of them would have to be copied.
    """

    kind: ClassVar[str] = "JsonArray"

    def scan(self) -> Iterator[SourceItem]:
        with self.path.open("rb") as stream:
            window = _Window(stream, self.name)
            window.skip_white_space()
            if window.character() != "[":
                begin = repr(window.character())
                advice = "a JSON array (files with one record per line need the suffix .jsonl)"
                raise InputError(f"data: {self.name} must contain {advice}, got a file that begins with {begin}.")
            window.move(1)
            window.skip_white_space()
            while window.character() != "]":
                value, offset, size = window.value()
                is_record = isinstance(value, dict)
                problem = RecordProblem("shape", f"the record must be a JSON object, got {type(value).__name__}")
                yield SourceItem(value if is_record else problem, (offset, size), offset + size)
                window.skip_white_space()
                if window.character() == ",":
                    window.move(1)
                    window.skip_white_space()
                elif window.character() != "]":
                    raise window.error("expected a comma or the end of the array after a record")
            window.move(1)
            window.skip_white_space()
            if window.character():
                raise window.error("unexpected text after the array")


class _Window:
    """
    The part of a UTF-8 file that is being decoded. `start` is a position in `text`, and `offset` the same in
    bytes.
    """

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
        return InputError(f"data: {self.name} is not valid JSON: {detail}, at byte {self.offset}.")

    def extend(self) -> None:
        """Drop what was read and append as much again, so that long records are not scanned often."""
        self.text = self.text[self.start :]
        self.start = 0
        content = self.stream.read(max(CHUNK_BYTES, len(self.text)))
        self.ended = not content
        try:
            self.text += self.decode(content, final=self.ended)
        except UnicodeDecodeError as error:
            position = self.stream.tell() - len(content)
            raise InputError(f"data: {self.name} is not valid UTF-8 ({error.reason} near byte {position}).") from error

    def character(self) -> str:
        """Return the next character, or an empty text at the end."""
        while self.start >= len(self.text) and not self.ended:
            self.extend()
        return self.text[self.start : self.start + 1]

    def move(self, count: int) -> None:
        """Move forward by a number of ASCII characters."""
        self.start += count
        self.offset += count

    def skip_white_space(self) -> None:
        while (character := self.character()) and character in WHITE_SPACE:
            self.move(1)

    def value(self) -> tuple[Any, int, int]:
        """Read the JSON value at this position, and return it with its offset and size in bytes."""
        while True:
            try:
                value, end = self.scan_value(self.text, self.start)
            except (ValueError, RecursionError) as error:
                if self.ended or len(self.text) - self.start > MAX_RECORD_BYTES:
                    raise self.error(f"expected a value ({error})") from error
                self.extend()
                continue
            if end == len(self.text) and not self.ended:  # a number may continue
                self.extend()
                continue
            written = self.text[self.start : end]
            size = len(written) if written.isascii() else len(written.encode())
            found = value, self.offset, size
            self.start, self.offset = end, self.offset + size
            return found
