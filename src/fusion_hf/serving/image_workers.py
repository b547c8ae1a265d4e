"""Decode clients' images in separate processes, which end when nobody waits for them.

`concurrent.futures` is not used, since its workers cannot be killed one by one and each would import torch.

While an image is decoded, it holds neither the interpreter of the server nor a place at the model. An image that takes
too much time or memory affects only the process that decodes it.
"""

import asyncio
import json
import logging
import math
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress

import numpy as np

from fusion_hf.model.configuration_fusion import NUM_TILES
from fusion_hf.model.image_processing_fusion import FusionImageProcessor
from fusion_hf.serving.api_errors import BAD_REQUEST, INTERNAL, ApiError, overloaded
from fusion_hf.serving.client_images import PARAM
from fusion_hf.serving.image_worker import MAX_MESSAGE_BYTES, REPLY_HEAD, REQUEST_HEAD, WorkerSettings
from fusion_hf.serving.limits import MEGABYTE, Limits

logger = logging.getLogger(__name__)
MIN_WORKERS, MAX_WORKERS = 2, 4  # at least two, so that one hostile image leaves a process for others
WAIT_SECONDS = 30  # in addition to the time limit of an image, since a process must start and shares the processor
GRACE_SECONDS = (
    0.5  # time to finish the image of a client that has disconnected, which is cheaper than starting a process
)
PIPE_BYTES = 2**20  # bytes of a result to read at a time
CODE = "import sys; sys.path[:] = sys.argv[2:]; from fusion_hf.serving.image_worker import main; main(sys.argv[1])"
# one thread per process, and no warnings about the missing torch
VARIABLES = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
BYTES_PER_PIXEL = 24  # maximum memory of a decoder per pixel, with a margin
BASE_BYTES = 128 * MEGABYTE  # memory for small images
PNG_BYTES = 4  # upper bound per pixel of a PNG file in RGB


class ImageWorkers:
    """
    Up to `MAX_WORKERS` processes, of which `start` starts one. Others are started when they are needed.

    Args:
        processor: the image processor that makes tiles. None checks files for another decoder instead.
        limits: the limits on images.
    """

    def __init__(self, processor: FusionImageProcessor | None, limits: Limits):
        tiles = processor is not None
        if processor is None:  # the other decoder handles the EXIF orientation itself
            processor = FusionImageProcessor(exif_transpose=False)
        configuration = json.loads(processor.to_json_string())
        memory = limits.image_pixels * BYTES_PER_PIXEL + BASE_BYTES
        settings = WorkerSettings(configuration, tiles, limits.image_pixels, limits.image_seconds, memory)
        count = max(MIN_WORKERS, min(MAX_WORKERS, limits.parallel, os.cpu_count() or 1))
        self._shape = (NUM_TILES + 1, 3, processor.size["height"], processor.size["width"])
        self._limits = limits
        self._workers = [_Worker(settings) for _ in range(count)]
        self._idle = list(self._workers)
        self._free = asyncio.Semaphore(count)
        self._recoveries: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """Start the process for the first image."""
        with suppress(OSError):  # the first image reports the error if it persists
            await self._idle[-1].start()

    async def close(self) -> None:
        """Kill all processes."""
        self._is_closed = True
        await asyncio.gather(*(worker.end() for worker in self._workers))
        await asyncio.gather(*self._recoveries)

    async def cut_tiles(self, content: bytes) -> np.ndarray:
        """
        Decode an image and cut it into tiles.

        Args:
            content: the bytes of the image file.

        Returns:
            The tiles `(5, 3, H, W)` in uint8.

        Raises:
            ApiError: if the image is not usable, or there is no time to decode it.
        """
        result = await self._ask(content, math.prod(self._shape))
        return np.frombuffer(result, dtype=np.uint8).reshape(self._shape)

    async def vet(self, content: bytes) -> tuple[str, bytes]:
        """
        Check an image for another decoder.

        Args:
            content: the bytes of the image file.

        Returns:
            The MIME type, and the bytes that the other decoder may decode.

        Raises:
            ApiError: if the image is not usable, or there is no time to decode it.
        """
        most = self._limits.image_pixels * PNG_BYTES + self._limits.image_bytes
        kind, _, replaced = (await self._ask(content, most)).partition(b"\n")
        return kind.decode("ascii"), replaced or content

    async def _ask(self, content: bytes, most: int) -> bytes:
        if self._is_closed:
            raise overloaded("The server is shutting down.")
        await self._free.acquire()
        worker = self._idle.pop()
        asking = asyncio.create_task(worker.ask(content, most))
        grace = GRACE_SECONDS
        try:
            done, _ = await asyncio.wait({asking}, timeout=self._limits.image_seconds + WAIT_SECONDS)
            if not done:
                grace = 0.0
                raise overloaded("The server had no time to decode the image. Try again soon.")
            return asking.result()
        finally:
            if asking.done() and worker.is_alive:
                self._give_back(worker)
            else:
                recovery = asyncio.create_task(self._recover(worker, asking, grace))
                self._recoveries.add(recovery)
                recovery.add_done_callback(self._recoveries.discard)

    def _give_back(self, worker: "_Worker") -> None:
        self._idle.append(worker)
        self._free.release()

    async def _recover(self, worker: "_Worker", asking: asyncio.Task[bytes], grace: float) -> None:
        """Prepare a process for the next image, by killing it and starting another one if needed."""
        if not asking.done():  # nobody waits for the result
            await asyncio.wait({asking}, timeout=grace)
            if not asking.done():
                await worker.end()
            await asyncio.gather(asking, return_exceptions=True)
        if not worker.is_alive and not self._is_closed:
            with suppress(OSError):  # the next image starts the process, or reports the error
                await worker.start()
        self._give_back(worker)


class _Worker:
    """One process, which is replaced when it ends."""

    def __init__(self, settings: WorkerSettings):
        self._settings = settings
        self._process: Process | None = None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the process. It takes about a second until it answers."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CODE, self._settings.to_json(), *sys.path,
            stdin=PIPE, stdout=PIPE, limit=PIPE_BYTES, env={**os.environ, **VARIABLES},
            start_new_session=True,  # Ctrl-C must reach the server only
        )  # fmt: skip

    async def end(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()

    async def ask(self, content: bytes, most: int) -> bytes:
        """
        Return the result of the process for an image.

        Args:
            content: the bytes of the image file.
            most: the maximum number of bytes of the result.

        Raises:
            ApiError: if the image is not usable, or has ended the process.
        """
        try:
            if not self.is_alive:
                await self.start()
        except OSError as error:
            logger.exception("No process for decoding images can be started")
            raise overloaded("The server cannot start a process to decode the image. Try again soon.") from error
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(REQUEST_HEAD.pack(len(content)))
            process.stdin.write(content)
            await process.stdin.drain()
            is_usable, length = REPLY_HEAD.unpack(await process.stdout.readexactly(REPLY_HEAD.size))
            if length > (
                most if is_usable else MAX_MESSAGE_BYTES
            ):  # not trusted, since the process has read a client's image
                process.kill()
            result = await process.stdout.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise self._why(await process.wait()) from error
        if not is_usable:
            raise ApiError(BAD_REQUEST, result.decode("utf-8", "replace"), PARAM)
        return result

    def _why(self, status: int) -> ApiError:
        """Return the error of an image whose process has ended."""
        if status >= 0:
            logger.error("A process that decodes images ended with status %d", status)
            return ApiError(INTERNAL, "The request failed. See the log of the server for the reason.")
        if status == -signal.SIGPROF:
            seconds = self._settings.seconds
            message = f"Decoding an image may take at most {seconds:g} s of processor time, and this one takes more."
            return ApiError(BAD_REQUEST, message, PARAM)
        if status == -signal.SIGKILL:  # killed by this server, or by a system without memory
            return overloaded("The process that decoded the image was killed. Try again soon.")
        message = f"The image cannot be used: its decoder crashed ({signal.Signals(-status).name})."
        return ApiError(BAD_REQUEST, message, PARAM)
