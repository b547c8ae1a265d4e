"""A process that decodes clients' images and nothing else, so that it can be ended at any moment.

[`ImageWorkers`] starts it and speaks with it through its standard input and output: a length, then so many bytes, in
both directions. Decoders of some formats keep the interpreter's lock until they are done, and no thread can be ended.
"""

import json
import math
import os
import struct
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

with suppress(ImportError):  # Windows has no such limits: there the time of the clock alone is bounded
    import resource

REQUEST_HEAD = struct.Struct("<Q")  # length
REPLY_HEAD = struct.Struct("<?Q")  # whether the image can be used, length
MAX_MESSAGE_BYTES = 2000
MEGABYTE = 2**20
BYTES_PER_PIXEL = 24  # the most that a decoder needs for a pixel, with a margin
BASE_BYTES = 128 * MEGABYTE  # what a small image may cost
SIZES = Path("/proc/self/statm")  # the first number is the address space in pages; Linux
# their decoders let other threads of a process run
UNLOCKED_FORMATS = ("JPEG", "PNG")


@dataclass(frozen=True)
class WorkerSettings:
    """
    processor: the image processor's configuration.
    tiles: whether the result is the image's tiles; else it is what vLLM is given, see `vet`.
    max_pixels: of an image.
    seconds: of the processor's time for an image.
    """

    processor: dict[str, Any]
    tiles: bool
    max_pixels: int
    seconds: int

    def to_json(self) -> str:
        """As the command line of the process has it."""
        return json.dumps(asdict(self))

    @property
    def memory_bytes(self) -> int:
        """What the process may use for an image."""
        return self.max_pixels * BYTES_PER_PIXEL + BASE_BYTES


def main(settings_json: str) -> None:
    """Answer until the standard input ends."""
    settings = WorkerSettings(**json.loads(settings_json))
    replies = _take_standard_output()
    # transformers, which the image processor is made of, would import it: seconds, and hundreds of megabytes
    sys.modules["torch"] = None  # type: ignore[assignment]
    from fusion_hf.image_processing_fusion import FusionImageProcessor

    processor = FusionImageProcessor.from_dict(settings.processor)
    _bound_memory(settings.memory_bytes)
    while head := sys.stdin.buffer.read(REQUEST_HEAD.size):
        content = sys.stdin.buffer.read(*REQUEST_HEAD.unpack(head))
        _bound_time(settings.seconds)
        is_usable, result = _answer(content, processor, settings)
        replies.write(REPLY_HEAD.pack(is_usable, len(result)))
        replies.write(result)
        replies.flush()


def _take_standard_output() -> BinaryIO:
    """The standard output for replies alone: what libraries of decoders print goes to the standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _bound_memory(more: int) -> None:
    """Let the process use so many bytes beside those that it uses now; not where that cannot be bounded."""
    if not SIZES.exists():
        return
    pages = int(SIZES.read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _bound_time(seconds: int) -> None:
    """Let the system end the process after so many further seconds of the processor's time, or up to one more."""
    if "resource" not in globals():
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    end = math.ceil(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (end if hard == resource.RLIM_INFINITY else min(end, hard), hard))


def _answer(content: bytes, processor: Any, settings: WorkerSettings) -> tuple[bool, bytes]:
    from fusion_hf.serving.errors import ApiError

    try:
        make = cut_tiles if settings.tiles else vet
        return True, make(content, processor, settings.max_pixels)
    except ApiError as error:
        return False, error.message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
    except MemoryError:
        message = f"The image needs too much memory to be decoded; allowed: {settings.memory_bytes} bytes."
        return False, message.encode()


def cut_tiles(content: bytes, processor: Any, max_pixels: int) -> bytes:
    """The image as bytes `(5, 3, height, width)`.

    Raises:
        ApiError: if it cannot be used.
    """
    from fusion_hf.serving.images import decode_picture

    image = decode_picture(content, processor, max_pixels)
    return processor.cut(image, processor.size, processor.resample).tobytes()


def vet(content: bytes, processor: Any, max_pixels: int) -> bytes:
    """
    The image's MIME type and a line break; then a PNG file of the same pixels, if whoever decodes the image itself
    could do nothing else meanwhile.

    Raises:
        ApiError: if it cannot be used.
    """
    from PIL import Image

    from fusion_hf.image_processing_fusion import FORMATS
    from fusion_hf.serving.images import decode_picture

    image = decode_picture(content, processor, max_pixels)
    with Image.open(BytesIO(content), formats=FORMATS) as opened:
        kind, exif = str(opened.format), opened.info.get("exif", b"")
    if kind in UNLOCKED_FORMATS:
        return f"{Image.MIME[kind]}\n".encode()
    file = BytesIO(f"{Image.MIME['PNG']}\n".encode())
    file.seek(0, os.SEEK_END)
    image.save(file, "PNG", compress_level=1, exif=exif)
    return file.getvalue()
