"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable

POLL_SECONDS = 0.01


def wait_until(
    happened: Callable[[], object],
    seconds: float,
    say: Callable[[], object] = lambda: "nothing happens",
    pause: float = POLL_SECONDS,
) -> None:
    """Return once it happened, and look after each pause; fail after so many seconds, with what there is to say."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds:g} s: {say()}"
        time.sleep(pause)
