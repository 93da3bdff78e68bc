"""Signals that ask a training or sampling to save and stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM)


class Interrupted(Exception):
    """Interruption of a training or sampling whose state is saved. signum: the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def heeded(*signals: signal.Signals) -> list[signal.Signals]:
    """Return those that this process does not ignore: nohup protects it from SIGHUP, a shell's `&` from SIGINT."""
    return [each for each in signals if signal.getsignal(each) is not signal.SIG_IGN]


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the first signal received, or 0. Ignored signals stay ignored."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    old: dict[int, Any] = {signum: signal.signal(signum, note) for signum in heeded(*_SIGNALS)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
