"""Watchdog of a job: it ends with its Snakemake, so that it does not work beside the next run."""

import os
import platform
import signal
import threading
import time
from collections.abc import Callable

from consistency.base.progress import SUPERVISOR

_POLL = 0.5  # seconds


def watch_supervisor() -> None:
    """Send this process SIGTERM when its Snakemake is killed (a kill -9 leaves its jobs running).

    Does nothing without a supervisor, or with one on another machine.
    """
    host, _, pid = os.environ.get(SUPERVISOR, "").rpartition(":")
    if host == platform.node() and pid.isdigit():
        watch(int(pid), lambda: os.kill(os.getpid(), signal.SIGTERM))


def watch(pid: int, then: Callable[[], None]) -> None:
    """Call a function, in a thread of its own, once a process of this machine has ended."""

    def wait() -> None:
        while _alive(pid):
            time.sleep(_POLL)
        then()

    threading.Thread(target=wait, daemon=True).start()


def _alive(pid: int) -> bool:
    """Tell whether a process is running. A zombie, which stays where there is no init, is not."""
    import psutil  # a fifth of the time of --help, which watches nobody

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
