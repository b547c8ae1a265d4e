"""Images decoded in processes of their own: the same pixels, and an end whenever one is wanted."""

import asyncio
import io
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.costly_images import flat, one_bit_png
from tests.helpers.image_files import jpeg_of_many_scans
from tests.helpers.serving import IMAGE_FILE, POLL_SECONDS, STOP_SECONDS

from fusion_hf.inference.chat_model import to_pixel_values
from fusion_hf.model.image_opening_fusion import FORMATS, ORIENTATION_TAG
from fusion_hf.model.image_processing_fusion import FusionImageProcessor
from fusion_hf.serving.api_errors import ApiError
from fusion_hf.serving.client_images import PARAM
from fusion_hf.serving.image_workers import GRACE_SECONDS, MAX_WORKERS, ImageWorkers
from fusion_hf.serving.limits import Limits

WIDTH, HEIGHT = 90, 60
BYTES = {"do_rescale": False, "do_normalize": False}
COSTLY_SIDE = 8000  # a second of a processor's time
BRIEF = 0.2  # seconds
ORDINARY = Limits()
FOREVER = Limits(image_pixels=2**28, image_seconds=600)
MEGABYTE = 2**20
LAST_QUARTER = 8  # an orientation: turned by 90 degrees


def noise(mode: str) -> Image.Image:
    random = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 2**16, (HEIGHT, WIDTH), dtype=np.uint16))
    return Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8), "RGBA").convert(mode)


def saved(mode: str, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    noise(mode).save(file, kind, **settings)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = LAST_QUARTER
    return exif


FILES = {
    "rgb.jpg": saved("RGB", "JPEG"),
    "progressive.jpg": saved("RGB", "JPEG", progressive=True),
    "cmyk.jpg": saved("CMYK", "JPEG"),
    "turned.jpg": saved("RGB", "JPEG", exif=turned()),
    "turned.png": saved("RGB", "PNG", exif=turned()),
    "turned.webp": saved("RGB", "WEBP", exif=turned(), lossless=True),
    "rgba.png": saved("RGBA", "PNG"),
    "rgba.webp": saved("RGBA", "WEBP", lossless=True),
    "palette.gif": saved("P", "GIF"),
    "one_bit.png": saved("1", "PNG"),
    "grey.bmp": saved("L", "BMP"),
    "grey_16_bits.png": saved("I;16", "PNG"),
    "grey_16_bits.tif": saved("I;16", "TIFF"),
    "rgb.jp2": saved("RGB", "JPEG2000"),
    "rgb.ppm": saved("RGB", "PPM"),
}
PROCESSORS = {
    "default": {},
    "as_it_lies": {"exif_transpose": False},
    "another": {
        "size": {"height": 30, "width": 20},
        "resample": 2,
        "image_mean": (0.1, 0.2, 0.3),
        "do_rescale": False,
    },
}


def make_processor(**settings: Any) -> FusionImageProcessor:
    return FusionImageProcessor(**{"size": {"height": 48, "width": 48}} | settings)


@asynccontextmanager
async def running(processor: FusionImageProcessor | None, limits: Limits = ORDINARY) -> AsyncIterator[ImageWorkers]:
    workers = ImageWorkers(processor, limits)
    try:
        yield workers
    finally:
        await workers.close()


def run(work: Callable[[ImageWorkers], Awaitable[Any]], limits: Limits = ORDINARY, tiles: bool = True) -> Any:
    async def run_and_close() -> Any:
        async with running(make_processor() if tiles else None, limits) as workers:
            return await work(workers)

    return asyncio.run(run_and_close())


def refused(content: bytes, limits: Limits = ORDINARY) -> ApiError:
    """The error of an image, after which a good one is read."""

    async def work(workers: ImageWorkers) -> ApiError:
        with pytest.raises(ApiError) as error:
            await workers.cut_tiles(content)
        assert (await workers.cut_tiles(IMAGE_FILE.read_bytes())).shape == (5, 3, 48, 48)
        return error.value

    return run(work, limits)


async def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + STOP_SECONDS
    while not is_so():
        assert time.monotonic() < end
        await asyncio.sleep(POLL_SECONDS)


def pids(workers: ImageWorkers) -> list[int]:
    return [worker._process.pid for worker in workers._workers if worker.is_alive]


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def begin(workers: ImageWorkers, content: bytes) -> tuple[asyncio.Task[np.ndarray], int]:
    """An image that is being decoded, and the process that does it."""
    await workers.cut_tiles(IMAGE_FILE.read_bytes())  # which has started by now
    (pid,) = pids(workers)
    before = processor_seconds(pid)
    task = asyncio.create_task(workers.cut_tiles(content))
    await wait_until(lambda: processor_seconds(pid) > before + BRIEF)
    return task, pid


@pytest.mark.parametrize("name", PROCESSORS)
def test_tiles_and_values_are_those_of_the_processor(name: str):
    processor = make_processor(**PROCESSORS[name])

    async def read() -> dict[str, np.ndarray]:
        async with running(processor) as workers:
            return {file: await workers.cut_tiles(content) for file, content in FILES.items()}

    for file, tiles in asyncio.run(read()).items():
        image = Image.open(io.BytesIO(FILES[file]), formats=FORMATS)
        assert np.array_equal(tiles, processor(image, return_tensors="np", **BYTES)["pixel_values"][0]), file
        values = processor(image, return_tensors="pt")["pixel_values"]
        ours = to_pixel_values(tiles, processor)
        assert torch.equal(ours, values) and ours.dtype == values.dtype and ours.is_contiguous(), file


def test_files_for_other_decoders_have_the_same_pixels():
    """JPEG and PNG files pass; others become PNG, for their decoders keep the interpreter's lock."""

    async def vet(workers: ImageWorkers) -> dict[str, tuple[str, bytes]]:
        return {file: await workers.vet(content) for file, content in FILES.items()}

    processor = make_processor()
    for file, (kind, content) in run(vet, tiles=False).items():
        if file.endswith((".jpg", ".png")):
            assert content == FILES[file]
            assert kind == ("image/png" if file.endswith("png") else "image/jpeg")
            continue
        assert kind == "image/png" and content.startswith(b"\x89PNG")
        before, after = (
            processor(Image.open(io.BytesIO(file)), return_tensors="np")["pixel_values"]
            for file in (FILES[file], content)
        )
        assert np.array_equal(before, after), file


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "none of BMP, GIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "none of BMP, GIF"),
        (FILES["rgb.jpg"][:200], "cannot be"),
        (one_bit_png(6000), "more than max_image_pixels = 33554432"),
    ],
    ids=["nothing", "postscript", "truncated", "large"],
)
def test_images_that_cannot_be_used(content: bytes, part: str):
    error = refused(content)
    assert (error.status, error.param) == (400, PARAM)
    assert part in error.message


@pytest.mark.parametrize(
    "content", [one_bit_png(COSTLY_SIDE), flat("WEBP", 4096), jpeg_of_many_scans(2048, size=100_000)],
    ids=["png", "webp", "scans"],
)  # fmt: skip
def test_an_image_that_takes_long(content: bytes):
    begin = time.monotonic()
    error = refused(content, replace(FOREVER, image_seconds=BRIEF))
    assert (error.status, error.param) == (400, PARAM)
    assert f"at most {BRIEF:g} s" in error.message or "scans" in error.message
    assert time.monotonic() - begin < STOP_SECONDS / 2


def test_an_image_that_needs_much_memory():
    async def work(workers: ImageWorkers) -> None:
        for worker in workers._workers:
            worker._settings = replace(worker._settings, memory_bytes=64 * MEGABYTE)
        with pytest.raises(ApiError, match=f"at most {64 * MEGABYTE} bytes of memory") as error:
            await workers.cut_tiles(one_bit_png(5000))
        assert error.value.status == 400
        assert (await workers.cut_tiles(IMAGE_FILE.read_bytes())).shape == (5, 3, 48, 48)

    run(work)


@pytest.mark.parametrize(
    ("number", "status", "part"),
    [
        (signal.SIGSEGV, 400, "SIGSEGV"),
        (signal.SIGKILL, 503, "was killed"),
        pytest.param(signal.SIGSTOP, 503, "no time", marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
)
def test_a_decoder_that_crashes_or_hangs(
    number: signal.Signals, status: int, part: str, monkeypatch: pytest.MonkeyPatch
):
    async def work(workers: ImageWorkers) -> None:
        await workers.cut_tiles(IMAGE_FILE.read_bytes())  # processes may take long to start
        with monkeypatch.context() as brief:
            brief.setattr("fusion_hf.serving.image_workers.WAIT_SECONDS", 2.0)
            task, pid = await begin(workers, one_bit_png(COSTLY_SIDE))
            os.kill(pid, number)
            with pytest.raises(ApiError, match=part) as error:
                await task
        assert error.value.status == status
        assert (await workers.cut_tiles(IMAGE_FILE.read_bytes())).shape == (5, 3, 48, 48)
        await wait_until(lambda: not Path(f"/proc/{pid}").exists())

    run(work, replace(FOREVER, image_seconds=3))


def test_a_process_that_died_meanwhile_is_replaced():
    async def work(workers: ImageWorkers) -> None:
        await workers.cut_tiles(IMAGE_FILE.read_bytes())
        (pid,) = pids(workers)
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: not pids(workers))
        assert (await workers.cut_tiles(IMAGE_FILE.read_bytes())).shape == (5, 3, 48, 48)

    run(work)


def test_nobody_waits_for_the_result():
    """The image of a client that is gone costs half a second more, and a small one no new process."""

    async def work(workers: ImageWorkers) -> None:
        task, pid = await begin(workers, one_bit_png(COSTLY_SIDE))
        begun = time.monotonic()
        task.cancel()
        await wait_until(lambda: not Path(f"/proc/{pid}").exists())
        assert time.monotonic() - begun < 4 * GRACE_SECONDS
        await wait_until(lambda: len(workers._idle) == len(workers._workers))
        (successor,) = pids(workers)
        await workers.cut_tiles(IMAGE_FILE.read_bytes())
        task = asyncio.create_task(workers.cut_tiles(IMAGE_FILE.read_bytes()))
        await asyncio.sleep(0)
        task.cancel()
        await wait_until(lambda: len(workers._idle) == len(workers._workers))
        assert pids(workers) == [successor]

    run(work, FOREVER)


def test_there_are_few_processes_and_all_end():
    async def work() -> list[int]:
        async with running(make_processor(), FOREVER) as workers:
            good = [workers.cut_tiles(IMAGE_FILE.read_bytes()) for _ in range(20)]
            assert len(await asyncio.gather(*good)) == 20
            used = pids(workers)
            assert 2 <= len(used) <= MAX_WORKERS
            tasks = [asyncio.create_task(workers.cut_tiles(one_bit_png(COSTLY_SIDE))) for _ in range(6)]
            await asyncio.sleep(BRIEF)
            begun = time.monotonic()
            for task in tasks:
                task.cancel()
            await workers.close()
            assert time.monotonic() - begun < 2 * GRACE_SECONDS
            with pytest.raises(ApiError, match="shutting down"):
                await workers.cut_tiles(IMAGE_FILE.read_bytes())
        return used

    for pid in asyncio.run(work()):
        assert not Path(f"/proc/{pid}").exists()


def test_a_process_is_small():
    """Without torch it starts within seconds, in some 80 MB."""

    async def work(workers: ImageWorkers) -> None:
        await workers.cut_tiles(IMAGE_FILE.read_bytes())
        (pid,) = pids(workers)
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        (resident,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
        assert resident < 150 * MEGABYTE
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")

    run(work)
