"""Watchdog that ends a job with its Snakemake, so that it does not work beside the next run."""

import os
import platform
import signal
import threading
import time
from collections.abc import Callable

from consistency.base.progress import SUPERVISOR

_POLL = 0.5  # seconds


def watch_supervisor() -> None:
    """Send this process SIGTERM once its Snakemake is gone: a kill -9 leaves jobs running.

    Does nothing without a supervisor on this machine.
    """
    host, _, pid = os.environ.get(SUPERVISOR, "").rpartition(":")
    if host == platform.node() and pid.isdigit():
        watch(int(pid), lambda: os.kill(os.getpid(), signal.SIGTERM))


def watch(pid: int, then: Callable[[], None]) -> None:
    """Call a function, in a thread, once a process of this machine has ended."""

    def wait() -> None:
        while _alive(pid):
            time.sleep(_POLL)
        then()

    threading.Thread(target=wait, daemon=True).start()


def _alive(pid: int) -> bool:
    """Tell whether a process is running. A zombie is not; without an init it stays."""
    import psutil  # slow, and --help does not need it

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
