"""A process that only decodes clients' images, so that it can be killed at any moment.

[`ImageWorkers`] starts it, and communicates through its standard input and output: a length, followed by that many
bytes, in both directions. Decoders of some formats hold the interpreter's lock until they finish, and threads cannot
be killed.
"""

import json
import os
import signal
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

REQUEST_HEAD = struct.Struct("<Q")  # length
REPLY_HEAD = struct.Struct("<?Q")  # whether the image is usable, length
MAX_MESSAGE_BYTES = 2000
NICENESS = 5  # lower priority than the server and its answers
SIZES = Path("/proc/self/statm")  # on Linux, the first number is the address space in pages
# formats whose decoders release the interpreter's lock
UNLOCKED_FORMATS = ("JPEG", "PNG")


@dataclass(frozen=True)
class WorkerSettings:
    """
    The settings of an image worker.

    Attributes:
        processor: the configuration of the image processor.
        tiles: whether the result is the tiles of the image. Otherwise it is the input of vLLM, see `vet`.
        max_pixels: the maximum number of pixels of an image.
        seconds: the maximum processor time per image in seconds.
        memory_bytes: the memory for an image, in addition to that of the process itself.
    """

    processor: dict[str, Any]
    tiles: bool
    max_pixels: int
    seconds: float
    memory_bytes: int

    def to_json(self) -> str:
        """Return the settings as text for the command line of the process."""
        return json.dumps(asdict(self))


def main(settings_json: str) -> None:
    """
    Decode images until the standard input ends.

    Args:
        settings_json: the settings as JSON.
    """
    settings = WorkerSettings(**json.loads(settings_json))
    replies = _take_standard_output()
    # prevents the image processor's transformers from importing torch, which takes seconds and hundreds of megabytes
    sys.modules["torch"] = None  # type: ignore[assignment]
    from PIL import Image

    from fusion_hf.model.image_processing_fusion import FusionImageProcessor

    # replaces PIL's limit, which may be lower; the processor rejects larger images
    Image.MAX_IMAGE_PIXELS = settings.max_pixels
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    processor = FusionImageProcessor.from_dict(settings.processor)
    if sys.platform != "win32":
        os.nice(NICENESS)
    _bound_memory(settings.memory_bytes)
    while head := sys.stdin.buffer.read(REQUEST_HEAD.size):
        content = sys.stdin.buffer.read(*REQUEST_HEAD.unpack(head))
        with _bounded_time(settings.seconds):
            is_usable, result = _answer(content, processor, settings)
        replies.write(REPLY_HEAD.pack(is_usable, len(result)))
        replies.write(result)
        replies.flush()


def _take_standard_output() -> BinaryIO:
    """Reserve the standard output for replies. What decoders' libraries print goes to the standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _bound_memory(more: int) -> None:
    """Limit the memory of the process to so many bytes more than now. Only Linux reports the current amount."""
    if not SIZES.exists():
        return
    import resource

    pages = int(SIZES.read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


@contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    """Let the system kill the process after so many seconds of processor time, whatever code is running."""
    if sys.platform == "win32":  # Windows has no such limit, so only the server's own one applies
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(content: bytes, processor: Any, settings: WorkerSettings) -> tuple[bool, bytes]:
    """
    Return the image as bytes `(5, 3, height, width)` or the result of `vet`, or False and a message if it is not
    usable.
    """
    from fusion_hf.serving.api_errors import ApiError
    from fusion_hf.serving.client_images import decode_client_image

    try:
        image = decode_client_image(content, processor, settings.max_pixels)
        if settings.tiles:
            return True, processor.split_tiles(image, processor.size, processor.resample).tobytes()
        return True, vet(content, image)
    except ApiError as error:
        return False, error.message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
    except MemoryError:
        message = (
            f"Decoding an image may take at most {settings.memory_bytes} bytes of memory, and this one takes more."
        )
        return False, message.encode()


def vet(content: bytes, image: Any) -> bytes:
    """
    Return the MIME type of a file with a decoded image, and a line break.

    If the decoder would block other threads, a PNG file of the same pixels follows, which the caller decodes instead.

    Args:
        content: the file.
        image: the decoded image.
    """
    from PIL import Image

    from fusion_hf.model.image_opening_fusion import identify_image

    opened = identify_image(content)
    kind, exif = str(opened.format), opened.info.get("exif", b"")
    if kind in UNLOCKED_FORMATS:
        return f"{Image.MIME[kind]}\n".encode()
    file = BytesIO(f"{Image.MIME['PNG']}\n".encode())
    file.seek(0, os.SEEK_END)
    image.save(file, "PNG", compress_level=1, exif=exif)
    return file.getvalue()
