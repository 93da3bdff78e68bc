"""The Slurm job of this process: its owner, its time limit and its requeueing."""

import os
import subprocess
import sys

_JOB = "SLURM_JOB_ID"
#: set by a job step of Snakemake to the job that is its rule's alone, "number CPUs"; its CPUs per task, if known
OWN = "CONSISTENCY_SLURM_JOB"
_CPUS = "SLURM_CPUS_PER_TASK"
_MARGIN = 10.0  # minutes before the time limit, or a tenth of it if that is less
_LEAST = 0.5  # minutes
_PATIENCE = 60  # seconds for the controller


def number() -> str | None:
    """Return the id of the job that this process is in, perhaps with others; None outside Slurm."""
    return os.environ.get(_JOB)


def in_job() -> bool:
    """Tell whether this process is in a Slurm job. Any child inherits that: `owned` tells whose the job is."""
    return number() is not None


def note_own() -> None:
    """Note, in the job step of Snakemake's Slurm executor, that the job was submitted for this rule alone.

    A group's rules share a job, and so do all rules under the local executor within an allocation. The step removes
    Slurm's own variables before it starts the rule.
    """
    if "slurm-jobstep" in sys.argv and "--local-groupid" not in sys.argv:
        os.environ[OWN] = f"{number()} {os.environ.get(_CPUS, '')}"


def owned() -> bool:
    """Tell whether this process has its Slurm job, with all its GPUs and its time, to itself."""
    return in_job() and os.environ.get(OWN, "").split()[:1] == [number()]


def cpus_per_task() -> str:
    """Return the CPUs of each of the job's tasks, '' if unknown."""
    noted = os.environ.get(OWN, "").split()[1:] if owned() else []
    return os.environ.get(_CPUS) or "".join(noted)


def working_minutes(minutes: float) -> float:
    """Return the minutes after which a job with that time limit must save and exit. Slurm kills it at the limit;
    starting up, the last step and saving take time too."""
    return minutes - max(min(_MARGIN, minutes / 10), _LEAST)


def requeue() -> str:
    """Requeue this job under its own number, so that Snakemake keeps waiting and counts no retry. Slurm then ends the
    job's processes. Returns Slurm's error message, '' on success."""
    words = ["scontrol", "requeue", os.environ[_JOB]]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join(done.stderr.split()) or f"exit code {done.returncode}" if done.returncode else ""
