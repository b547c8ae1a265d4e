"""Where images come from: files, addresses, base64, bytes, streams, arrays, and lists of all these."""

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

MAX_DOWNLOAD_BYTES = 2**28  # of an image at an address: who serves it may never stop sending
MAX_DOWNLOAD_SECONDS = 30.0  # for an image at an address, redirects included
IMAGE_DIMENSIONS = (2, 3)  # of the array of one image; with more it is a batch of images
LIST_DTYPES = "OU"  # of arrays that hold paths or objects, not pixels
SOURCE: Any = ("fusion_hf", "source")  # a key of PIL's `info`; what a file brings there has keys of text
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
    List the images of a caller in their order, each as it was given.

    Args:
        images: one image, or (nested) lists of them. An array or tensor of more than three dimensions is a list of its
            parts.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in LIST_DTYPES:
        return flatten_images(images.tolist())
    return [image for part in images for image in flatten_images(part)] if is_group(images) else [images]


def is_group(images: Any) -> bool:
    """Return whether it stands for several images, or for none."""
    if is_array(images):
        return bool(images.ndim > max(IMAGE_DIMENSIONS))
    return isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview))


def is_array(image: Any) -> bool:
    """Return whether it is an array or a tensor. Processes that decode images have no torch."""
    return isinstance(image, np.ndarray) or is_torch_tensor(image)


def defer_images(images: Any) -> list[Image.Image]:
    """
    Return the images of `flatten_images`, to be opened when it is their turn; None stands for no image.

    transformers passes nothing but images of PIL, arrays and tensors from a processor to its image processor. So each
    is an empty image of PIL that carries its source. A class of our own would not do: with `trust_remote_code`,
    processor and image processor come from two copies of this file.
    """
    return [_defer(image) for image in flatten_images(images) if image is not None]


def _defer(source: Any) -> Image.Image:
    image = Image.Image()
    image.info[SOURCE] = source
    return image


def is_deferred(image: Any) -> bool:
    """Return whether it comes from `defer_images`."""
    return isinstance(image, Image.Image) and SOURCE in image.info


def open_source(source: Any) -> Any:
    """
    Open an image without decoding it. Images, arrays and tensors are returned themselves.

    Args:
        source: a path, an http(s) address, base64, a data URI, the content of a file as bytes or a binary stream, or
            `{"bytes": ..., "path": ...}` of the library datasets, one of which may be None.

    Raises:
        ValueError: names the source, and says why there is no image in it.
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
    except (ValueError, IndexError) as error:  # of base64, of a data URI without a comma, and of a closed stream
        raise ValueError(f"No image: {name} is neither a file, an http(s) URL, a data URI nor base64.") from error


def describe_source(source: Any) -> str:
    """Name a source in an error: its path or address where it has one, else its kind."""
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
    """The content or else the path of an image that datasets has not decoded."""
    given = [source[key] for key in DATASETS_KEYS if source.get(key) is not None]
    if not given or not set(source) <= set(DATASETS_KEYS):
        raise ValueError(
            f"An image is a dict with the keys {', '.join(map(repr, source)) or 'none'}; allowed: 'bytes' and 'path', "
            "one of which may be None."
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
        "allowed are a path, an address, base64, bytes, a binary stream, an image of PIL, an array, a tensor, a dict "
        "with bytes or path, and lists of them"
    )


def _read_text(source: str) -> bytes:
    if source[: len(ADDRESSES[-1])].lower().startswith(ADDRESSES):
        return _download(source)
    if not source.startswith("data:") and os.path.isfile(source):  # noqa: PTH113 (a Path raises on long base64)
        return read_file(source)
    content = source.split(",", 1)[1] if source.startswith("data:") else source
    return base64.b64decode("".join(content.split()), validate=True)


def _read_stream(stream: Stream) -> bytes:
    """The content from the beginning, as PIL reads it: who has written an image to a stream stands at its end."""
    try:
        position = stream.tell()
        stream.seek(0)
    except OSError:  # it cannot seek
        position = None
    content = stream.read(MAX_FILE_BYTES + 1)
    if position is not None:
        stream.seek(position)
    if not isinstance(content, bytes):
        raise ImageError(f"the stream gives {type(content).__name__}; allowed: bytes, as of a file opened with 'rb'")
    return content


def _download(url: str) -> bytes:
    """What is at an http(s) address, up to MAX_DOWNLOAD_BYTES within MAX_DOWNLOAD_SECONDS."""
    try:
        is_address = url.isprintable() and urlsplit(url).port != 0
    except ValueError:  # of its host or port
        is_address = False
    if not is_address:
        raise OSError("this is no address")
    download = _DownloadThread(url, MAX_DOWNLOAD_BYTES, MAX_DOWNLOAD_SECONDS)
    download.start()
    return download.result()


class _DownloadThread(threading.Thread):
    """
    A download in a thread of its own: no setting of an HTTP client bounds its whole time, since each byte that
    arrives, of the headers too, begins the waiting anew.
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
            timeout=2 * self.seconds,  # of a single wait; `result` does not wait for it
            extensions={"trace": self._watch},
            headers={"Connection": "close"},  # an older connection's socket is not known, and could not be shut
        ) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                self._check()
                content += chunk
                if len(content) > self.max_bytes:
                    raise OSError(f"it has more than the allowed {self.max_bytes} bytes")
        return bytes(content)

    def result(self) -> bytes:
        """
        Wait for the content.

        Raises:
            OSError: if it takes too long, or the server or the network refuse.
        """
        try:
            self.join(self.seconds)
            is_late = self.is_alive()
        finally:
            self._end()
        if is_late:  # whatever the thread has made of its sockets' end
            raise OSError(f"it did not arrive within {self.seconds:g} seconds")
        if self.content is None:
            raise self.error or OSError("the download has failed")
        return self.content

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        """Keep the sockets that are connected, so that `_end` can shut them."""
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
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)  # a TLS socket's own is not for other threads
                except OSError:  # it is closed
                    continue
