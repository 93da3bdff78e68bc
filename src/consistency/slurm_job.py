"""The Slurm job that this process runs in: how long it may work, and how it asks to go on later."""

import os
import subprocess

_JOB = "SLURM_JOB_ID"
_MARGIN = 10.0  # minutes before a job's end, or a tenth of its time if that is less
_LEAST = 0.5  # minutes
_PATIENCE = 60  # seconds for the controller


def number() -> str | None:
    """The job's; None for a process that Slurm did not start."""
    return os.environ.get(_JOB)


def in_job() -> bool:
    """Whether Slurm started this process."""
    return number() is not None


def working_minutes(minutes: float) -> float:
    """After how many minutes a job that ends after so many has to save and leave: Slurm kills without mercy, and what
    went on before the verb began, and the last step and saving, take their time too."""
    return minutes - max(min(_MARGIN, minutes / 10), _LEAST)


def requeue() -> str:
    """Put this job back into the queue under its own number, so that Snakemake goes on waiting for it and no retry is
    used up. Slurm then ends all processes of the job. Returns what it says against that, nothing if it agrees."""
    words = ["scontrol", "requeue", os.environ[_JOB]]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join(done.stderr.split()) or f"exit code {done.returncode}" if done.returncode else ""
