"""Decoding of clients' images in processes of their own, which end when nobody waits for them.

They are no workers of `concurrent.futures`: none of those can be ended alone, and each would import torch.

No image holds the server's interpreter or one of the places at the model while it is decoded; an image that costs too
much time or memory costs nothing but the process that decodes it.
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
MIN_WORKERS, MAX_WORKERS = 2, 4  # one hostile image leaves a process for others
WAIT_SECONDS = 30  # beyond the time that an image may take: a process has to start, and others use the processor
GRACE_SECONDS = 0.5  # for the image of a client that is gone: to finish one is cheaper than to start a process
PIPE_BYTES = 2**20  # of a result that are read at once
CODE = "import sys; sys.path[:] = sys.argv[2:]; from fusion_hf.serving.image_worker import main; main(sys.argv[1])"
# one thread each, and nothing on the standard error about the absence of torch
VARIABLES = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
BYTES_PER_PIXEL = 24  # the most that a decoder needs for a pixel, with a margin
BASE_BYTES = 128 * MEGABYTE  # what a small image may cost
PNG_BYTES = 4  # more than a pixel of a PNG file in RGB takes


class ImageWorkers:
    """
    Up to `MAX_WORKERS` processes, one of which is started by `start`, others when they are needed.

    Args:
        processor: makes the tiles; None: there are none to make, files are read for another decoder.
        limits: of an image.
    """

    def __init__(self, processor: FusionImageProcessor | None, limits: Limits):
        tiles = processor is not None
        if processor is None:  # the other decoder turns images upright by itself, or does not
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
        """Start the process that decodes the first image."""
        with suppress(OSError):  # an image's error says it, if it does not pass
            await self._idle[-1].start()

    async def close(self) -> None:
        """End all processes, whatever they do."""
        self._is_closed = True
        await asyncio.gather(*(worker.end() for worker in self._workers))
        await asyncio.gather(*self._recoveries)

    async def cut_tiles(self, content: bytes) -> np.ndarray:
        """Return the tiles `(5, 3, H, W)`, uint8, of the image in a file's bytes.

        Raises:
            ApiError: if the image cannot be used, or there is no time for it.
        """
        result = await self._ask(content, math.prod(self._shape))
        return np.frombuffer(result, dtype=np.uint8).reshape(self._shape)

    async def vet(self, content: bytes) -> tuple[str, bytes]:
        """Return the image's MIME type, and the bytes in which others may decode it.

        Raises:
            ApiError: if the image cannot be used, or there is no time for it.
        """
        most = self._limits.image_pixels * PNG_BYTES + self._limits.image_bytes
        kind, _, replaced = (await self._ask(content, most)).partition(b"\n")
        return kind.decode("ascii"), replaced or content

    async def _ask(self, content: bytes, most: int) -> bytes:
        if self._is_closed:
            raise overloaded("The server is about to end.")
        await self._free.acquire()
        worker = self._idle.pop()
        asking = asyncio.create_task(worker.ask(content, most))
        grace = GRACE_SECONDS
        try:
            done, _ = await asyncio.wait({asking}, timeout=self._limits.image_seconds + WAIT_SECONDS)
            if not done:
                grace = 0.0
                raise overloaded("The server had no time to decode the image.")
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
        """Make a process ready for the next image, which may mean to end it and start another one."""
        if not asking.done():  # nobody waits for the result
            await asyncio.wait({asking}, timeout=grace)
            if not asking.done():
                await worker.end()
            await asyncio.gather(asking, return_exceptions=True)
        if not worker.is_alive and not self._is_closed:
            with suppress(OSError):  # then it starts with its next image, or that is told the reason
                await worker.start()
        self._give_back(worker)


class _Worker:
    """One process, or its successors."""

    def __init__(self, settings: WorkerSettings):
        self._settings = settings
        self._process: Process | None = None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the process; it will need a second until it answers."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CODE, self._settings.to_json(), *sys.path,
            stdin=PIPE, stdout=PIPE, limit=PIPE_BYTES, env={**os.environ, **VARIABLES},
            start_new_session=True,  # a person's Ctrl-C is for the server alone
        )  # fmt: skip

    async def end(self) -> None:
        """End the process at once, if there is one."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()

    async def ask(self, content: bytes, most: int) -> bytes:
        """Return the process's result for an image, of up to `most` bytes.

        Raises:
            ApiError: if the image cannot be used, or has ended the process.
        """
        try:
            if not self.is_alive:
                await self.start()
        except OSError as error:
            logger.exception("no process for images can be started")
            raise overloaded("The server has no room for a process that decodes the image.") from error
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(REQUEST_HEAD.pack(len(content)))
            process.stdin.write(content)
            await process.stdin.drain()
            is_usable, length = REPLY_HEAD.unpack(await process.stdout.readexactly(REPLY_HEAD.size))
            if length > (most if is_usable else MAX_MESSAGE_BYTES):  # whoever writes it has read a client's image
                process.kill()
            result = await process.stdout.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise self._why(await process.wait()) from error
        if not is_usable:
            raise ApiError(BAD_REQUEST, result.decode("utf-8", "replace"), PARAM)
        return result

    def _why(self, status: int) -> ApiError:
        """The error of an image whose process has ended."""
        if status >= 0:
            logger.error("a process that decodes images has ended with status %d", status)
            return ApiError(INTERNAL, "The request failed; the server's log says why.")
        if status == -signal.SIGPROF:
            seconds = self._settings.seconds
            message = f"The image takes more than {seconds:g} s of processor time to decode; allowed: {seconds:g} s."
            return ApiError(BAD_REQUEST, message, PARAM)
        if status == -signal.SIGKILL:  # this server's doing, or that of a system without memory
            return overloaded("The process that decodes the image was ended.")
        message = f"The image cannot be used: its decoder crashed ({signal.Signals(-status).name})."
        return ApiError(BAD_REQUEST, message, PARAM)
