"""Snakemake as a stage of DVC runs it: some rules of one study, going on after a run that was killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from consistency.errors import UserError

LOCKS = Path(".snakemake/locks")
PATIENCE = 60.0  # seconds for the jobs of a killed run to notice, save and leave
_POLL = 0.5


def run_rules(
    study: str, rules: list[str], targets: list[str], run: str | None = None, patience: float = PATIENCE
) -> int:
    """Let Snakemake make the targets by those rules alone, on $CORES cores (default: all). Returns its exit code.

    The others' results are taken as they are, and so are other students' than `run`'s, where one is named. When whoever
    called is gone (a killed `dvc repro`), Snakemake is interrupted. Raises UserError when another run is at work in
    this directory and does not leave in `patience` seconds.
    """
    if LOCKS.is_dir() and any(LOCKS.iterdir()):
        _require_alone(patience)
        unlock = ["--unlock", "--quiet", "all", *_config(study, None)]
        subprocess.run([sys.executable, "-m", "snakemake", *unlock], check=True)
    cores = os.environ.get("CORES", "all")
    words = ["--cores", cores, *_config(study, run), "--allowed-rules", *rules, "--", *targets]
    return _supervised([sys.executable, "-m", "snakemake", *words])


def _config(study: str, run: str | None) -> list[str]:
    return ["--config", f"studies={study}", *([] if run is None else [f"student={run}"])]


def _supervised(command: list[str]) -> int:
    """Run a command to its end; interrupt it when this process is told to end, or its parent has ended."""
    parent = os.getppid()
    process = subprocess.Popen(command)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        _interrupt(process.pid)

    # Ctrl-C reaches the whole group: Snakemake has it already. A handler that does nothing is not inherited.
    before = signal.signal(signal.SIGINT, lambda signum, frame: None), signal.signal(signal.SIGTERM, interrupt)
    try:
        while True:
            try:
                return process.wait(timeout=_POLL)
            except subprocess.TimeoutExpired:
                if os.getppid() != parent:
                    parent = os.getppid()
                    _interrupt(process.pid)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _require_alone(patience: float) -> None:
    """Wait until the processes of an earlier run have left this directory."""
    deadline = time.monotonic() + patience
    while others := _others():
        if time.monotonic() > deadline:
            raise UserError(
                "another run is at work in this directory: wait until it ends, or stop it: "
                f"kill {' '.join(map(str, others))}"
            )
        time.sleep(_POLL)


def _interrupt(pid: int) -> None:
    """What Ctrl-C does: SIGINT to a process and to all that it has started."""
    process = psutil.Process(pid)
    for each in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGINT)


def _others() -> list[int]:
    """Processes of Snakemake or of a stage whose working directory is this one, those that called us apart."""
    callers = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    return [
        process.pid
        for process in psutil.process_iter(["cwd", "cmdline"])
        if process.pid not in callers
        and process.info["cwd"] == str(Path.cwd())
        and {Path(word).name for word in (process.info["cmdline"] or [])[:3]} & {"snakemake", "consistency"}
    ]
