"""The Slurm job of this process: its time limit and its requeueing."""

import os
import subprocess

_JOB = "SLURM_JOB_ID"
_MARGIN = 10.0  # minutes before the time limit, or a tenth of it if that is less
_LEAST = 0.5  # minutes
_PATIENCE = 60  # seconds for the controller


def number() -> str | None:
    """Return the job's id; None if Slurm did not start this process."""
    return os.environ.get(_JOB)


def in_job() -> bool:
    """Tell whether Slurm started this process."""
    return number() is not None


def working_minutes(minutes: float) -> float:
    """Return the minutes after which a job with that time limit must save and exit. Slurm kills it at the limit;
    starting up, the last step and saving take time too."""
    return minutes - max(min(_MARGIN, minutes / 10), _LEAST)


def requeue() -> str:
    """Requeue this job under its own number, so that Snakemake keeps waiting and counts no retry. Slurm then ends the
    job's processes. Returns Slurm's error message, '' on success."""
    words = ["scontrol", "requeue", os.environ[_JOB]]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join(done.stderr.split()) or f"exit code {done.returncode}" if done.returncode else ""
