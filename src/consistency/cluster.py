"""Slurm as the head node sees it: what is checked before jobs are submitted, and which of them are in the queue."""

import getpass
import math
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from consistency.errors import UserError

PATIENCE = 60  # seconds for an answer of Slurm
_COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol")
_COMMENT = "rule_"  # how the comment of Snakemake's jobs begins: rule_student_wildcards_digits_ctm_0
_NAMED = 10  # jobs of an earlier run that an error names


@dataclass(frozen=True)
class Request:
    """What a rule asks of Slurm. partition: several with commas between, None for the cluster's default."""

    rule: str
    partition: str | None
    minutes: float
    gpus: bool


@dataclass(frozen=True)
class Partition:
    """minutes: its time limit, infinite without one."""

    name: str
    default: bool
    minutes: float
    gpus: bool


@dataclass(frozen=True)
class Job:
    """A job of this folder. name: the run of Snakemake that it belongs to; where: its nodes, or why it waits."""

    number: str
    name: str
    what: str
    state: str
    elapsed: str
    limit: str
    restarts: str
    where: str
    log: str


def require_ready(requests: Iterable[Request], folder: Path) -> None:
    """Raise UserError, before anything is submitted, for what would leave jobs pending for ever or let two of them
    work on one result: no Slurm here, none that answers, a partition that is not there, has no GPUs or too short a
    limit, jobs of an earlier run of this folder still in the queue."""
    for command in _COMMANDS:
        if shutil.which(command) is None:
            raise UserError(
                f"Slurm's {command} is not on the PATH of this machine: run this on a login node of the cluster, or "
                "without --profile slurm on this machine alone"
            )
    partitions = find_partitions()
    for request in sorted(set(requests), key=lambda request: request.rule):
        _require_possible(request, partitions)
    jobs = find_jobs(folder)
    if jobs:
        numbers = " ".join(job.number for job in jobs[:_NAMED])
        stop = f"scancel {numbers}" if len(jobs) <= _NAMED else f"scancel --name {','.join({job.name for job in jobs})}"
        raise UserError(
            f"an earlier run of this folder still has jobs in Slurm's queue, {len(jobs)} of them "
            f"(`python -m consistency jobs`): wait until they end, or stop them, they save: {stop}"
        )


def _require_possible(request: Request, partitions: Sequence[Partition]) -> None:
    """Raise UserError if Slurm would refuse such a job, or let it wait for ever."""
    names = request.partition.split(",") if request.partition else [p.name for p in partitions if p.default]
    edit = "in workflow/profiles/slurm/config.yaml"
    if not names:
        raise UserError(f"this cluster has no default partition: set slurm_partition {edit}")
    found = [p for p in partitions if p.name in names]
    missing = set(names) - {p.name for p in found}
    if missing:
        there = ", ".join(dict.fromkeys(p.name for p in partitions))
        raise UserError(
            f"rule {request.rule} asks for partition {min(missing)}, which this cluster does not have: set "
            f"slurm_partition {edit} to one of {there}"
        )
    longest = max(p.minutes for p in found)
    if request.minutes > longest:
        raise UserError(
            f"rule {request.rule} asks for {request.minutes:g} minutes, but partition {request.partition or names[0]} "
            f"gives {longest:g} at most, and the job would wait for ever: lower its runtime {edit}; a training goes on "
            "in as many jobs as it takes"
        )
    if request.gpus and not any(p.gpus for p in found):
        raise UserError(
            f"rule {request.rule} asks for GPUs, but partition {request.partition or names[0]} has none: set its "
            f"slurm_partition {edit}"
        )


def find_partitions() -> list[Partition]:
    """The partitions that this user may see. Raises UserError when Slurm does not answer."""
    rows = [line.split("|") for line in _ask("sinfo", "--noheader", "--format=%P|%l|%G").splitlines()]
    return [
        Partition(name.removesuffix("*"), name.endswith("*"), minutes_of(limit), "gpu" in gres)
        for name, limit, gres in rows
    ]


def minutes_of(limit: str) -> float:
    """Slurm's D-HH:MM:SS, HH:MM:SS or MM:SS, the leading parts left out where they are 0, in minutes."""
    if limit in ("infinite", "UNLIMITED", "n/a"):
        return math.inf
    days, _, clock = limit.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return 1440 * int(days or 0) + seconds / 60


def find_jobs(folder: Path) -> list[Job]:
    """This user's jobs that Snakemake has submitted from a folder and that are waiting or running. Raises UserError
    when Slurm does not answer."""
    names = ("JobID", "Name", "Comment", "StateCompact", "TimeUsed", "TimeLimit", "RestartCnt", "ReasonList", "STDOUT")
    columns = ",".join(f"{name}:400|" for name in (*names, "WorkDir"))
    jobs = []
    for line in _ask("squeue", "--noheader", f"--user={getpass.getuser()}", f"--Format={columns}").splitlines():
        number, name, comment, *said, place, _ = (cell.strip() for cell in line.split("|"))
        if Path(place) == folder and comment.startswith(_COMMENT):
            what = comment.removeprefix(_COMMENT).replace("_wildcards_", " ")
            # Slurm 22.05 tells the pattern of the file's name, not the name.
            said[-1] = said[-1].replace("%A_%a", number).replace("%j", number)
            jobs.append(Job(number, name, what, *said))
    return jobs


def print_jobs(folder: Path | None = None) -> None:
    """One line for each job of the folder."""
    folder = folder or Path.cwd()
    jobs = find_jobs(folder)
    if not jobs:
        print(f"no jobs of {folder} are in Slurm's queue")
        return
    rows = [("JOB", "WHAT", "STATE", "TIME", "LIMIT", "RESTARTS", "WHERE", "LOG")]
    for job in jobs:
        log = Path(job.log)
        shown = log.relative_to(folder) if log.is_relative_to(folder) else log
        rows.append((job.number, job.what, job.state, job.elapsed, job.limit, job.restarts, job.where, str(shown)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _ask(*words: str) -> str:
    """What a command of Slurm says."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise UserError(f"Slurm's {words[0]} is not on the PATH of this machine") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm's controller did not answer {words[0]} in {PATIENCE} s: try again later") from None
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise UserError(f"Slurm's controller does not answer ({said}): try again when `sinfo` does")
    return done.stdout
