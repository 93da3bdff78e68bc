"""File locks that admit one process at a time."""

import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from consistency.base.errors import UserError

PATIENCE = 60.0  # seconds for a process whose workflow was killed to notice and exit


@contextmanager
def held(path: Path, doing: str, patience: float = math.inf, advice: str = "", quiet: bool = False) -> Iterator[None]:
    """Hold a file lock. The operating system releases it however the process ends; the file stays.

    doing: activity of another holder for the messages, such as 'is working in FOLDER'; patience: seconds to wait for
    it; advice: end of the error if the file cannot be written; quiet: wait without a message. Raises UserError.
    """
    lock, deadline, told = FileLock(path, fallback_to_soft=False), time.monotonic() + patience, False
    try:
        while True:
            # FileNotFoundError: the previous holder has just removed the lock or the folder.
            with suppress(Timeout, FileNotFoundError):
                lock.acquire(blocking=False)
                break
            other = f"another process ({_owner(path)}) {doing}"
            if time.monotonic() > deadline:
                raise UserError(f"{other}: wait for it or stop it")
            if not told and not quiet:
                print(f"{other}: waiting for it", flush=True)
                told = True
            time.sleep(0.1)
    except OSError as error:
        if error.filename is not None:
            raise UserError(f"cannot write {path}: {error.strerror or error}{advice}") from None
        raise UserError(
            f"the disk of {path} does not support file locks ({error.strerror}), which keep two runs out of one "
            "result: mount it with them (Lustre: -o flock), or work on another disk"
        ) from None
    try:
        with suppress(OSError):  # A full disk is reported by the block's own writes.
            path.write_text(f"pid {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        lock.release()


@contextmanager
def only_one(folder: Path, doing: str) -> Iterator[None]:
    """Hold the folder's lock, so that two runs cannot write into it. The end of the block removes the lock, and the
    folder if it is empty. Otherwise as `held`."""
    path = folder / "lock"
    with held(path, f"{doing} in {folder}", PATIENCE, "; fix the permission or choose another --state"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            # A folder that is not empty holds a state to resume from, or the next process's lock.
            with suppress(OSError):
                folder.rmdir()


def _owner(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""
