"""Start of Snakemake for `make demo` and DVC: alone in this directory, and resuming after a killed run.

Snakemake's own lock keeps two runs apart but outlives a `kill -9`. AT_WORK tells a live run from a killed one: the
operating system releases it when Snakemake ends, however that happens.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

from consistency.base.errors import UserError, user_error
from consistency.config.study import Study
from consistency.runtime.supervision import watch

LOCKS = Path(".snakemake/locks")
AT_WORK = Path(".snakemake/at-work.lock")
PATIENCE = 60.0  # seconds for a run whose caller was killed to notice, save and exit
#: set for a Snakemake that accepts existing files whatever their age and settings
TAKEN = "CONSISTENCY_TAKEN"
_POLL = 0.5
_INTERRUPT = signal.SIGUSR2  # a shell's `&` has SIGINT ignored, and it stays so
#: set for Snakemake to the process that it ends with; set for `snakemake --unlock`, which runs with the lock held
_CALLER, _UNLOCKING = "CONSISTENCY_CALLER", "CONSISTENCY_UNLOCKING"


def reproduce(study: Study, rules: list[str] | None, targets: list[str]) -> NoReturn:
    """Become Snakemake and make the targets by those rules alone, or the whole study without any.

    Uses $CORES cores (default: all); is interrupted when its caller is gone. With rules, existing files are up to date,
    because the caller (DVC) decides what to make again. Raises UserError outside a checkout, if another run in this
    directory does not exit within PATIENCE seconds, or if a run on a cluster was killed.
    """
    if not Path("Snakefile").is_file():
        raise UserError("no Snakefile here: run this in a checkout's root, or the stages one by one (`--help`)")
    lock = _alone()
    # A list, because Snakemake takes a lone 007 for a number.
    snakemake, config = [sys.executable, "-m", "snakemake"], ["--config", f"studies=[{study.name}]"]
    if LOCKS.is_dir() and any(LOCKS.iterdir()):
        if os.environ.get("SNAKEMAKE_PROFILE"):
            raise UserError(
                "an earlier run was killed, and its jobs may still be in Slurm's queue: when `squeue --me` has none "
                "of this directory, run `snakemake --unlock` and then the same command again"
            )
        print("An earlier run was killed; resuming it.", flush=True)
        words = [*snakemake, "--unlock", "--quiet", "all", *config]
        subprocess.run(words, env=os.environ | {_UNLOCKING: "1"}, check=True)
    fcntl.flock(lock, fcntl.LOCK_SH)
    os.set_inheritable(lock, True)
    words = [*snakemake, "--cores", os.environ.get("CORES", "all"), *config]
    words += ["--allowed-rules", *rules] if rules else []
    taken = {TAKEN: "1"} if rules else {}
    os.execve(sys.executable, [*words, "--", *targets], os.environ | taken | {_CALLER: str(os.getppid())})


def join_run() -> None:
    """Mark this directory as in use until this process ends; interrupt it when its caller is gone."""
    if caller := os.environ.pop(_CALLER, ""):
        signal.signal(_INTERRUPT, signal.default_int_handler)
        watch(int(caller), _interrupt)
    if _UNLOCKING not in os.environ:
        # reproduce() reports a disk that has no locks or is not writable.
        with suppress(OSError):
            fcntl.flock(_open(), fcntl.LOCK_SH)


def _open() -> int:
    AT_WORK.parent.mkdir(exist_ok=True)
    return os.open(AT_WORK, os.O_RDWR | os.O_CREAT, 0o666)


def _alone() -> int:
    """Wait until no Snakemake is at work in this directory. Returns the held lock."""
    deadline, told = time.monotonic() + PATIENCE, False
    try:
        lock = _open()
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            if not told:
                print(f"Another run is at work in this directory; waiting {PATIENCE:g} s for its end.", flush=True)
            told = True
            if time.monotonic() > deadline:
                raise UserError(
                    "another run is at work in this directory: wait until it ends, or stop it with Ctrl-C "
                    f"(`lslocks` names the process that holds {AT_WORK})"
                )
            time.sleep(_POLL)
    except OSError as error:
        message = f"cannot lock {AT_WORK}: {error.strerror}; work on a disk that has file locks and can be written"
        raise user_error(error, message) from None


def _interrupt() -> None:
    """Interrupt this process as Ctrl-C does, and ask its descendants to save and exit."""
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            each.terminate()
    os.kill(os.getpid(), _INTERRUPT)
