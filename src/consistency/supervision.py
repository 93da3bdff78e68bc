"""A job whose Snakemake is gone must not work on beside the next run."""

import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

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
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _zombie(pid)


def _zombie(pid: int) -> bool:
    """Whether it has ended and only waits for its parent to notice, as in a container without an init."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # The name stands in parentheses and may hold anything; the state follows.
    return stat.rpartition(")")[2].split()[0] == "Z"
