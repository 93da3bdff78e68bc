"""One process at a time: in a folder, or at what a file stands for."""

import fcntl
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from consistency.errors import UserError


@contextmanager
def only_one(folder: Path, doing: str, patience: float) -> Iterator[None]:
    """Hold the folder's lock, so that two runs cannot write into it; the lock goes when the block ends, and the folder
    too if nothing is left in it.

    doing: what another run does there, for the error; patience: seconds to wait for it. Raises UserError when it has
    not left by then, or the folder cannot be written.
    """
    deadline = time.monotonic() + patience
    path = folder / "lock"
    while (file := _locked(path)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"another process ({path.read_text() if path.exists() else ''}) {doing} in {folder}: wait for it "
                "or stop it"
            )
        time.sleep(0.2)
    with file:
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            # Not empty: there is a state to go on with, or the next process is here already.
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def held(path: Path, waiting: str, patience: float = math.inf, late: str = "", advice: str = "") -> Iterator[None]:
    """Hold a file's lock, which ends with its process, however that ends; the file stays.

    waiting: what is printed while another process holds it; patience: seconds to wait for that one; late: the error
    after them; advice: the end of the error when the file cannot be written. Raises UserError with these two.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}{advice}") from None
    with file:
        deadline, told = time.monotonic() + patience, False
        while not _taken(file, path):
            if not told:
                print(waiting, flush=True)
                told = True
            if time.monotonic() > deadline:
                raise UserError(late)
            time.sleep(0.1)
        yield


def _locked(path: Path) -> TextIO | None:
    """The lock, if it is free."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except FileNotFoundError:  # whoever had the lock has just removed the folder
        return None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; mend the permission or choose another --state"
        ) from None
    with suppress(FileNotFoundError):
        # Who had it may have removed it meanwhile, and a lock that nobody else finds locks nothing.
        if _taken(file, path) and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            return file
    file.close()
    return None


def _taken(file: TextIO, path: Path) -> bool:
    """Take the lock if nobody has it. Raises UserError on a disk that has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        file.close()
        raise UserError(
            f"the disk of {path} has no file locks ({error.strerror}), without which two runs could damage one result: "
            "have it mounted with them (Lustre: -o flock), or work on another disk"
        ) from None
    return True
