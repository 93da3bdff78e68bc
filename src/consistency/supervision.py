"""A job whose Snakemake is gone must not work on beside the next run."""

import os
import platform
import signal
import threading
import time
from collections.abc import Callable

#: set by the workflow to "host:pid" of the Snakemake that starts the jobs
SUPERVISOR = "CONSISTENCY_SUPERVISOR"
_POLL = 0.5  # seconds


def watch_supervisor() -> None:
    """Send this process SIGTERM when its Snakemake is killed (a kill -9 leaves its jobs behind).

    Does nothing without a supervisor, or under one on another machine.
    """
    host, _, pid = os.environ.get(SUPERVISOR, "").rpartition(":")
    if host == platform.node() and pid.isdigit():
        watch(int(pid), lambda: os.kill(os.getpid(), signal.SIGTERM))


def watch(pid: int, then: Callable[[], None]) -> None:
    """Call a function, in a thread of its own, when a process of this machine has ended."""

    def wait() -> None:
        while _alive(pid):
            time.sleep(_POLL)
        then()

    threading.Thread(target=wait, daemon=True).start()


def _alive(pid: int) -> bool:
    """Tell whether it is at work: one that only waits for its parent's notice, as without an init, is not."""
    import psutil  # a fifth of the time of --help, which watches nobody

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
