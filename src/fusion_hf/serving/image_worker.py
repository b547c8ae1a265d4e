"""A process that decodes clients' images and nothing else, so that it can be ended at any moment.

[`ImageWorkers`] starts it and speaks with it through its standard input and output: a length, then so many bytes, in
both directions. Decoders of some formats keep the interpreter's lock until they are done, and no thread can be ended.
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
REPLY_HEAD = struct.Struct("<?Q")  # whether the image can be used, length
MAX_MESSAGE_BYTES = 2000
NICENESS = 5  # the server and its answers come first
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
    memory_bytes: for an image, beside what the process needs by itself.
    """

    processor: dict[str, Any]
    tiles: bool
    max_pixels: int
    seconds: float
    memory_bytes: int

    def to_json(self) -> str:
        """As the command line of the process has it."""
        return json.dumps(asdict(self))


def main(settings_json: str) -> None:
    """Answer until the standard input ends."""
    settings = WorkerSettings(**json.loads(settings_json))
    replies = _take_standard_output()
    # transformers, which the image processor is made of, would import it: seconds, and hundreds of megabytes
    sys.modules["torch"] = None  # type: ignore[assignment]
    from PIL import Image

    from fusion_hf.model.image_processing_fusion import FusionImageProcessor

    # instead of PIL's own, which may be lower; the processor refuses more
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
    """The standard output for replies alone: what libraries of decoders print goes to the standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _bound_memory(more: int) -> None:
    """Let the process use so many bytes beside those that it uses now; only Linux says how many these are."""
    if not SIZES.exists():
        return
    import resource

    pages = int(SIZES.read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


@contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    """Let the system end the process after so many seconds of the processor's time, whatever code it is in then."""
    if sys.platform == "win32":  # has no such clock: the server's own bound has to do
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(content: bytes, processor: Any, settings: WorkerSettings) -> tuple[bool, bytes]:
    """The image as bytes `(5, 3, height, width)`, or what `vet` gives; False and a message if it cannot be used."""
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
        message = f"The image needs too much memory to be decoded; allowed: {settings.memory_bytes} bytes."
        return False, message.encode()


def vet(content: bytes, image: Any) -> bytes:
    """
    The MIME type of a file whose image was decoded, and a line break; then a PNG file of the same pixels, if whoever
    decodes the image itself could do nothing else meanwhile.
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
