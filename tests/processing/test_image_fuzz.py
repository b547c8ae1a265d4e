"""Random files: nothing but documented errors, quickly, in bounded memory, and the same at each place."""

import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.hostile_images import costly_files, mutated_files, structured_files
from tests.helpers.image_places import Outcome, of_ask, of_opened, of_opener, of_processor, of_reader, of_server

from fusion_hf.inference import ChatModel

MAX_PIXELS = 2**21
MOST_SECONDS = 2.0  # of a processor, for one file at one place
BYTES_PER_PIXEL, SPARE_BYTES = 20, 2**25
EVERY = 20  # so many files go to the places that are slower to reach
STATUS = Path("/proc/self/status")


@pytest.fixture(scope="module")
def chat_model() -> ChatModel:
    chat_model = ChatModel.load()
    chat_model.processor.image_processor.max_image_pixels = MAX_PIXELS
    return chat_model


class Fuzzer:
    """Opens files at all places and counts what becomes of them."""

    def __init__(self, folder: Path, chat_model: ChatModel):
        self.path = folder / "image.bin"
        self.chat_model = chat_model
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0
        self.largest = 0

    def run(self, files: Iterator[bytes]) -> None:
        """
        Raises:
            AssertionError: for the first file that is not as it should be.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number, content in enumerate(files):
                self._open(content, everywhere=number % EVERY == 0)

    def report(self) -> str:
        """What came out."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{counts}; slowest {self.slowest:.2f} s, most memory {self.largest / 2**20:.0f} MiB"

    def _open(self, content: bytes, everywhere: bool) -> None:
        self.path.write_bytes(content)
        before, begin = _start_peak(), time.process_time()
        first = of_opener(content, MAX_PIXELS)
        self._measure(content, begin, before)
        outcomes = [of_processor(self.path, MAX_PIXELS), of_reader(self.path, MAX_PIXELS)]
        if everywhere:
            outcomes += [of_ask(self.path, self.chat_model), of_server(content, self.chat_model, MAX_PIXELS)]
        for outcome in outcomes:
            assert outcome.pixels == first.pixels, self._kept(content)
            assert first.words in outcome.words, self._kept(content)
        if everywhere and first.pixels is not None:
            assert of_opened(content, MAX_PIXELS).pixels == first.pixels, self._kept(content)
        self.counts["files"] += 1
        self.counts["opened" if first.pixels is not None else "refused"] += 1
        self.counts["opened or refused everywhere"] += everywhere

    def _measure(self, content: bytes, begin: float, before: int) -> None:
        seconds, peak = time.process_time() - begin, _peak() - before
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, peak)
        assert seconds < MOST_SECONDS, self._kept(content)
        assert peak < BYTES_PER_PIXEL * MAX_PIXELS + SPARE_BYTES, self._kept(content)

    def _kept(self, content: bytes) -> str:
        return f"{self.path}, {len(content)} bytes, beginning with {content[:24]!r}"


def _start_peak() -> int:
    """Forget the most memory so far; returns what is in use, 0 where Linux does not say."""
    if not STATUS.exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM") if STATUS.exists() else 0


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+)", STATUS.read_text())
    assert match is not None
    return int(match[1]) * 1024


@pytest.fixture
def fuzzer(tmp_path: Path, chat_model: ChatModel) -> Fuzzer:
    return Fuzzer(tmp_path, chat_model)


def check(fuzzer: Fuzzer, count: int) -> None:
    assert fuzzer.counts["files"] == count
    assert fuzzer.counts["opened"] > count / 20 and fuzzer.counts["refused"] > count / 20


def test_some_files(fuzzer: Fuzzer):
    fuzzer.run(mutated_files(seed=1, count=300))
    fuzzer.run(structured_files(seed=2, count=300))
    check(fuzzer, 600)


@pytest.mark.slow
def test_many_files(fuzzer: Fuzzer, capsys: pytest.CaptureFixture[str]):
    fuzzer.run(mutated_files(seed=3, count=20_000))
    mutated = fuzzer.report()
    fuzzer.run(structured_files(seed=4, count=4_000))
    check(fuzzer, 24_000)
    with capsys.disabled():
        print(f"\nimages: {mutated}; with structured ones {fuzzer.report()}")  # noqa: T201 (it is the test's result)


@pytest.mark.slow
def test_costly_files():
    """At the server's own limit of pixels; the memory of what is opened is measured in processes of their own."""
    counts: Counter[str] = Counter()
    for name, content in costly_files(5792).items():
        begin = time.process_time()
        outcome: Outcome = of_opener(content, 2**25)
        assert time.process_time() - begin < MOST_SECONDS, name
        counts["opened" if outcome.pixels is not None else "refused"] += 1
    assert counts["opened"] == 4 and counts["refused"] > 8
