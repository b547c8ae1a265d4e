"""Sources of images: files, URLs, base64, bytes, streams, arrays, and lists of them."""

import base64
import importlib
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError
from PIL import Image
from transformers.utils import is_torch_tensor

from .image_limits_fusion import ImageError
from .image_opening_fusion import MAX_FILE_BYTES, identify_image, read_file

MAX_DOWNLOAD_BYTES = 2**28  # of an image at a URL: a server may never stop sending
MAX_DOWNLOAD_SECONDS = 30.0  # for an image at a URL, redirects included
IMAGE_DIMENSIONS = (2, 3)  # of the array of one image; an array with more dimensions is a batch
LIST_DTYPES = "OU"  # of arrays that hold paths or objects instead of pixels
SOURCE: Any = ("fusion_hf", "source")  # a key of PIL's `info`; keys that come from a file are strings
ADDRESSES = ("http://", "https://")
DATASETS_KEYS = ("bytes", "path")  # of an image that the library datasets has not decoded
LONGEST_NAME = 100  # characters
# huggingface_hub's HTTP client is httpx or httpx2, depending on its release
InvalidURL: type[Exception] = importlib.import_module(HTTPError.__module__).InvalidURL


@runtime_checkable
class Stream(Protocol):
    """A binary file that is open for reading."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...

    def tell(self) -> int: ...


def flatten_images(images: Any) -> list[Any]:
    """
    List images in their order, each as it was given.

    Args:
        images: One image, or (nested) lists of images. An array or tensor with more than three dimensions is a list of
            images.

    Returns:
        `list`: The images.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in LIST_DTYPES:
        return flatten_images(images.tolist())
    return [image for part in images for image in flatten_images(part)] if is_group(images) else [images]


def is_group(images: Any) -> bool:
    """Return whether `images` stands for several images, or for none."""
    if is_array(images):
        return bool(images.ndim > max(IMAGE_DIMENSIONS))
    return isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview))


def is_array(image: Any) -> bool:
    """Return whether `image` is an array or a tensor. This works without torch, for processes that decode images."""
    return isinstance(image, np.ndarray) or is_torch_tensor(image)


def defer_images(images: Any) -> list[Image.Image]:
    """
    Wrap images so that each is opened only when it is its turn.

    transformers passes only PIL images, arrays and tensors from a processor to its image processor. Each source is
    therefore wrapped in an empty PIL image. A class of its own would not work: with `trust_remote_code`, processor
    and image processor come from two copies of this file.

    Args:
        images: One image, or (nested) lists of images. None stands for no image.

    Returns:
        `list[PIL.Image.Image]`: The wrapped sources, in order.
    """
    return [_defer(image) for image in flatten_images(images) if image is not None]


def _defer(source: Any) -> Image.Image:
    image = Image.Image()
    image.info[SOURCE] = source
    return image


def is_deferred(image: Any) -> bool:
    """Return whether `image` comes from [`defer_images`]."""
    return isinstance(image, Image.Image) and SOURCE in image.info


def open_source(source: Any) -> Any:
    """
    Open an image without decoding it. Images, arrays and tensors are returned unchanged.

    Args:
        source: A path, an http(s) URL, base64, a data URI, the content of a file as bytes or a binary stream, or
            `{"bytes": ..., "path": ...}` as in the library datasets, where one of the two may be None.

    Returns:
        `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`: The image.

    Raises:
        ValueError: If the image cannot be opened. The message names the source and the reason.
    """
    if is_deferred(source):
        return open_source(source.info[SOURCE])
    if isinstance(source, Image.Image) or is_array(source):
        return source
    if isinstance(source, Mapping):
        source = _choose(source)
    name = describe_source(source)
    try:
        return identify_image(_read(source))
    except ImageError as error:
        raise ValueError(f"The image {name} cannot be opened: {error.reason}.") from error
    except (OSError, HTTPError, InvalidURL) as error:
        raise ValueError(f"The image {name} cannot be opened: {str(error).rstrip('.')}.") from error
    except (ValueError, IndexError) as error:  # invalid base64, a data URI without a comma, or a closed stream
        raise ValueError(f"An image must be a file, an http(s) URL, a data URI or base64, got {name}.") from error


def describe_source(source: Any) -> str:
    """Describe a source in an error message: by its path or URL, or else by its size or type."""
    if is_deferred(source):
        return describe_source(source.info[SOURCE])
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        return repr(text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}...")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"of {len(source)} bytes"
    return f"of type {type(source).__name__}"


def _choose(source: Mapping[str, Any]) -> Any:
    """Return the content, or else the path, of an image that the library datasets has not decoded."""
    given = [source[key] for key in DATASETS_KEYS if source.get(key) is not None]
    if not given or not set(source) <= set(DATASETS_KEYS):
        raise ValueError(
            "An image that is a dict must have the keys 'bytes' and 'path', one of which may be None, got "
            f"{', '.join(map(repr, source)) or 'no key'}."
        )
    return given[0]


def _read(source: Any) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        return _read_text(source)
    if isinstance(source, Stream):
        return _read_stream(source)
    raise ImageError(
        "an image must be a path, a URL, base64, bytes, a binary stream, a PIL image, an array, a tensor, a dict "
        "with 'bytes' or 'path', or a list of them"
    )


def _read_text(source: str) -> bytes:
    if source[: len(ADDRESSES[-1])].lower().startswith(ADDRESSES):
        return _download(source)
    if not source.startswith("data:") and os.path.isfile(source):  # noqa: PTH113 (a Path raises on long base64)
        return read_file(source)
    content = source.split(",", 1)[1] if source.startswith("data:") else source
    return base64.b64decode("".join(content.split()), validate=True)


def _read_stream(stream: Stream) -> bytes:
    """Read a stream from its beginning, as PIL does: after writing an image to a stream, its position is the end."""
    try:
        position = stream.tell()
        stream.seek(0)
    except OSError:  # the stream cannot seek
        position = None
    content = stream.read(MAX_FILE_BYTES + 1)
    if position is not None:
        stream.seek(position)
    if not isinstance(content, bytes):
        raise ImageError(f"its stream must return bytes, like a file opened with 'rb', got {type(content).__name__}")
    return content


def _download(url: str) -> bytes:
    """Download the content of an http(s) URL, at most `MAX_DOWNLOAD_BYTES` in `MAX_DOWNLOAD_SECONDS`."""
    try:
        is_address = url.isprintable() and urlsplit(url).port != 0
    except ValueError:  # of the host or the port
        is_address = False
    if not is_address:
        raise OSError("it is not a valid URL")
    download = _DownloadThread(url, MAX_DOWNLOAD_BYTES, MAX_DOWNLOAD_SECONDS)
    download.start()
    return download.result()


class _DownloadThread(threading.Thread):
    """
    A thread that downloads a URL. HTTP clients cannot bound the total time, because their timeouts start again with
    each byte that arrives, even in the headers.
    """

    def __init__(self, url: str, max_bytes: int, seconds: float):
        super().__init__(daemon=True)
        self.url, self.max_bytes, self.seconds = url, max_bytes, seconds
        self.content: bytes | None = None
        self.error: Exception | None = None
        self.lock = threading.Lock()
        self.sockets: list[socket.socket] = []
        self.is_over = False

    def run(self) -> None:
        try:
            self.content = self._fetch()
        except (OSError, HTTPError, InvalidURL, ValueError) as error:
            self.error = error

    def _fetch(self) -> bytes:
        content = bytearray()
        with get_session().stream(
            "GET",
            self.url,
            follow_redirects=True,
            timeout=2 * self.seconds,  # for a single wait; `result` does not wait for it
            extensions={"trace": self._watch},
            headers={"Connection": "close"},  # the socket of a reused connection is unknown and could not be shut down
        ) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                self._check()
                content += chunk
                if len(content) > self.max_bytes:
                    raise OSError(f"it has more than {self.max_bytes} bytes, the maximum for a download")
        return bytes(content)

    def result(self) -> bytes:
        """
        Wait for the download to end.

        Returns:
            `bytes`: The content.

        Raises:
            OSError: If the download takes too long, or if the server or the network fails.
        """
        try:
            self.join(self.seconds)
            is_late = self.is_alive()
        finally:
            self._end()
        if is_late:  # whatever the thread reports after its sockets were shut down
            raise OSError(f"it did not arrive within {self.seconds:g} seconds")
        if self.content is None:
            raise self.error or OSError("the download failed")
        return self.content

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        """Remember connected sockets, so that `_end` can shut them down."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self.lock:
                self.sockets.append(info["return_value"].get_extra_info("socket"))
        self._check()

    def _check(self) -> None:
        if self.is_over:
            raise TimeoutError

    def _end(self) -> None:
        with self.lock:
            self.is_over = True
            for connected in self.sockets:
                try:
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)  # TLS `shutdown` is not thread-safe
                except OSError:  # it is already closed
                    continue
