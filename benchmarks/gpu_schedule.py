"""Run the parts of a measurement one after the other in limited time, each in a process of its own."""

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from fusion_hf.common.outputs import write_atomically

MEASURED, FAILED, STOPPED, NO_TIME = "measured", "failed", "stopped: no time", "not run: no time"
SUMMARY = "gpu.json"
EXIT_SECONDS = 5  # time in which a process must end after its part

Result = dict[str, Any]
# sends the results so far, of the part or for the named file
Emit = Callable[..., None]


@dataclass(frozen=True)
class Part:
    """
    Something to measure.

    Args:
        limit: the maximum time in seconds.
        least: the minimum time in seconds that must be left to start the part.
        measure: the function to call with an `Emit`.
    """

    name: str
    limit: float
    least: float
    measure: Callable[[Emit], None]


@dataclass
class Outcome:
    """How a part ended. `error` is the text of the error that ended it."""

    status: str
    seconds: float = 0.0
    error: str = ""
    result: Result | None = None


def run_parts(
    parts: Sequence[Part],
    seconds: float,
    run: Callable[[Part, float], Outcome],
    note: Callable[[dict[str, Outcome]], None],
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """
    Run the parts in order, as long as there is time.

    Args:
        seconds: the time for all parts.
        run: runs a part for at most so many seconds.
        note: is called with the outcomes after each part.
    """
    end = now() + seconds
    outcomes: dict[str, Outcome] = {}
    for part in parts:
        left = end - now()
        outcomes[part.name] = Outcome(NO_TIME) if left < part.least else run(part, min(part.limit, left))
        note(outcomes)
    return outcomes


class _Teller:
    """Send results out of the process of a part, and the text of an error if one ends it."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def __enter__(self) -> Emit:
        return self.emit

    def emit(self, result: Result, file: str | None = None) -> None:
        # encoded here, so that a result that cannot be written is an error of this part
        self.connection.send((file, encode(result)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        text = "" if error is None else "".join(traceback.format_exception_only(error)).strip()
        self.connection.send((text, None))


def encode(result: Result) -> bytes:
    """Encode a result as the content of a file."""
    return f"{json.dumps(result, indent=1)}\n".encode()


def _work(measure: Callable[[Emit], None], connection: Connection) -> None:
    os.setsid()  # so that processes that the part starts can be killed with it
    with _Teller(connection) as emit:
        measure(emit)


class ForkedRunner:
    """
    Run parts in forks of this process, which has imported everything and must not have used CUDA.

    A part that fails, dies or hangs does not affect others, and its results up to then are kept.

    Args:
        folder: the folder for the files of parts.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("fork")

    def __call__(self, part: Part, seconds: float) -> Outcome:
        start = time.monotonic()
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_work, args=(part.measure, sender), name=part.name)
        process.start()
        sender.close()
        outcome = Outcome(STOPPED)
        if self._listen(receiver, start + seconds, outcome):
            process.join(EXIT_SECONDS)
            if outcome.status == STOPPED:  # the process did not report how it ended
                outcome.error = f"The process ended with status {process.exitcode}."
                outcome.status = FAILED
        _end(process)
        outcome.seconds = round(time.monotonic() - start, 1)
        return outcome

    def _listen(self, receiver: Connection, end: float, outcome: Outcome) -> bool:
        """Write the results that a part sends, and return whether it ended in time."""
        while receiver.poll(max(end - time.monotonic(), 0)):
            try:
                name, content = receiver.recv()
            except EOFError:
                return True
            if content is None:
                outcome.error, outcome.status = name, FAILED if name else MEASURED
                return True
            if name is None:
                outcome.result = json.loads(content)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / name, content)
        return False


def _end(process: Any) -> None:
    """Kill the process of a part and all processes that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # no process is left, or it has no group of its own yet
        process.kill()
    process.join()
