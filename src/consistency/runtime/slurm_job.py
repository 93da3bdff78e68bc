"""The Slurm job of this process: its time limit and its requeueing."""

import os
import subprocess

_JOB = "SLURM_JOB_ID"
_MARGIN = 10.0  # minutes before a job's end, or a tenth of its time if that is less
_LEAST = 0.5  # minutes
_PATIENCE = 60  # seconds for the controller


def number() -> str | None:
    """Return the job's id; None if Slurm did not start this process."""
    return os.environ.get(_JOB)


def in_job() -> bool:
    """Tell whether Slurm started this process."""
    return number() is not None


def working_minutes(minutes: float) -> float:
    """Return the minutes after which a job with that time limit has to save and exit. Slurm kills it at the limit, and
    the start before the verb, the last step and saving take time too."""
    return minutes - max(min(_MARGIN, minutes / 10), _LEAST)


def requeue() -> str:
    """Requeue this job under its own number, so that Snakemake keeps waiting for it and uses up no retry. Slurm then
    ends all processes of the job. Returns Slurm's objection, '' if there is none."""
    words = ["scontrol", "requeue", os.environ[_JOB]]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join(done.stderr.split()) or f"exit code {done.returncode}" if done.returncode else ""
