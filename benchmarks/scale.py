"""What many studies cost beside their computing: the plan of all their jobs, each job's start, and Slurm's part.

    python benchmarks/scale.py [--studies 1 4] [--seeds 10] [--tflops 100]
    python benchmarks/scale.py --slurm --default-resources slurm_partition=cpu ...

Made-up studies of six students with an official teacher lie in a temporary copy of this checkout; where results are to
be there, empty files stand for them. With --slurm, which comes last, the words after it go to `snakemake --profile
slurm`: eight tiny datasets are made one after the other, and a student's jobs are submitted to begin in an hour, and
cancelled. At the end: how long the four full-size studies take together, by the count of `estimate`.
"""

import argparse
import dataclasses
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml

from consistency.provenance import hardware

# torch is imported at the end: a child's peak memory counts what its parent has when it starts.
ROOT = Path(__file__).resolve().parents[1]
COPIED = ("Snakefile", "config", "environment.yml", "profiles", "slurm", "src", "workflow")
FULL_SIZE = ("cifar10-uncond", "cifar10-cond", "ffhq64", "imagenet64")
#: what has to be there before every student of scale0 can be trained
BEFORE_STUDENTS = (
    "resources/vgg16-397923af.pth",
    "results/scale0/coefficients/coefficients.npz",
    "results/scale0/scores/calibration.csv",
)
SMALL = 8  # tiny datasets that are made under Slurm


@dataclasses.dataclass(frozen=True)
class Run:
    """A command that has ended. wall, cpu: seconds; memory: MiB, the peak of one process."""

    wall: float
    cpu: float
    memory: float
    output: str


@contextmanager
def checkout() -> Iterator[Path]:
    """A copy of this checkout, without results, that goes away."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for part in COPIED:
            source = ROOT / part
            if source.is_dir() and not source.is_symlink():
                shutil.copytree(source, folder / part, symlinks=True)
            else:
                shutil.copy2(source, folder / part, follow_symlinks=False)
        yield folder


def full_studies(folder: Path, count: int, seeds: int) -> list[str]:
    """Write so many studies of six students and their seeds. Returns their names."""
    content = yaml.safe_load((ROOT / "config/studies/cifar10-uncond.yaml").read_text())
    content["varies"].append("distance")
    content["students"]["analytic-l2"] = {"preconditioning": "analytic", "distance": "l2"}
    content["seeds"] = list(range(seeds))
    return [_write(folder, content, f"scale{k}") for k in range(count)]


def tiny_studies(folder: Path) -> list[str]:
    """Write copies of the tests' study. Returns their names."""
    content = yaml.safe_load((ROOT / "config/studies/tiny.yaml").read_text())
    return [_write(folder, content, f"tiny{k}") for k in range(SMALL)]


def _write(folder: Path, content: dict[str, object], name: str) -> str:
    (folder / f"config/studies/{name}.yaml").write_text(yaml.safe_dump({**content, "name": name}, sort_keys=False))
    return name


def snakemake(folder: Path, studies: Sequence[str], *words: str) -> Run:
    """Run Snakemake in a folder; it must end well."""
    start = time.perf_counter()
    process = start_snakemake(folder, studies, *words)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{output}\nsnakemake {' '.join(words)} failed")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)


def start_snakemake(folder: Path, studies: Sequence[str], *words: str) -> "subprocess.Popen[str]":
    """Start Snakemake in a folder, in a process group of its own."""
    command = [sys.executable, "-m", "snakemake", "--config", f"studies=[{','.join(studies)}]", *words]
    environment = {**os.environ, "CONSISTENCY_LIVE": "0", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def pretend(folder: Path, studies: Sequence[str], *targets: str) -> None:
    """Make Snakemake believe that targets (default: all) are there: empty files, marked as made by today's code."""
    for line in snakemake(folder, studies, "--summary", "--quiet", "all", "--", *targets).output.splitlines():
        name, *columns = line.split("\t")
        path = folder / name
        if not columns or name == "output_file" or path.exists():
            continue
        # Every file of ours has a suffix, and no folder.
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    snakemake(folder, studies, "--touch", "--forceall", "--cores", "1000", "--quiet", "all", "--", *targets)


def print_plans(counts: Sequence[int], seeds: int) -> None:
    """The table of the plans of so many studies, and the start of one job."""
    print("| studies x students x seeds | results | jobs | wall, s | CPU, s | peak memory, MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for count in counts:
        with checkout() as folder:
            studies = full_studies(folder, count, seeds)
            row = f"{count} x 6 x {seeds}"
            _print_run(f"{row} | none", snakemake(folder, studies, "--dry-run"))
            one = ["--target-jobs", f"student:study={studies[0]},run=analytic,seed=0", "--allowed-rules", "student"]
            started = snakemake(folder, studies, "--dry-run", *one, "--force", "--mode", "remote", "--nolock")
            pretend(folder, studies)
            _print_run(f"{row} | all", snakemake(folder, studies, "--dry-run"))
            _print_run(f"{row} | one job, by itself", started)


def _print_run(what: str, run: Run) -> None:
    jobs = re.search(r"(?m)^total +(\d+)", run.output)
    print(f"| {what} | {jobs[1] if jobs else 0} | {run.wall:.1f} | {run.cpu:.1f} | {run.memory:.0f} |", flush=True)


def print_jobs(words: Sequence[str]) -> None:
    """What Slurm jobs take beside their work, one after the other."""
    parts = []
    with checkout() as folder:
        for study in tiny_studies(folder):
            target = f"results/{study}/dataset/images.npy"
            run = snakemake(folder, [study], "--profile", "slurm", *words, "--", target)
            # Asked at once: Slurm forgets a job after MinJobAge, where it keeps no accounts.
            parts.append(_times(folder, re.findall(r"SLURM jobid (\d+)", run.output)[0], study))
    print(f"\n{len(parts)} jobs, one after the other; seconds, median (least to most); Slurm's clock has whole seconds")
    names = ("waiting", "before its work", "its work", "after its work")
    for name, values in zip(names, zip(*parts, strict=True), strict=True):
        print(f"{name:16} {statistics.median(values):5.1f} ({min(values):.1f} to {max(values):.1f})", flush=True)


def _times(folder: Path, number: str, study: str) -> tuple[float, float, float, float]:
    """Seconds that a job waited, took before its verb's first line, in the verb, and after it."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True, check=True)
    submitted, start, end = (
        datetime.fromisoformat(re.findall(rf" {name}=(\S+)", shown.stdout)[0])
        for name in ("SubmitTime", "StartTime", "EndTime")
    )
    log = (folder / f"logs/{study}/dataset.log").read_text()
    first = datetime.fromisoformat(re.findall(r"(?m)^--- (\S+ \S+) on", log)[-1])
    work = float((folder / f"logs/{study}/dataset.tsv").read_text().splitlines()[1].split()[0])
    before = (first - start).total_seconds()
    return (start - submitted).total_seconds(), before, work, (end - start).total_seconds() - before - work


def print_submission(words: Sequence[str], seeds: int) -> None:
    """How fast the jobs of one study's students are submitted, and cancelled by Ctrl-C."""
    with checkout() as folder:
        studies = full_studies(folder, 1, seeds)
        pretend(folder, studies, *BEFORE_STUDENTS)
        wanted = 6 * seeds
        held = ["--set-resources", "student:slurm_extra='--begin=now+1hour'"]
        limits = ["--jobs", "1000", "--max-jobs-per-timespan", "1000/1s", "--until", "student"]
        start = time.perf_counter()
        process = start_snakemake(folder, studies, "--profile", "slurm", *_joined([*words, *held]), *limits)
        assert process.stdout is not None
        times: list[float] = []
        said: list[str] = []
        try:
            while len(times) < wanted and (line := process.stdout.readline()):
                said.append(line)
                if "has been submitted with SLURM jobid" in line:
                    times.append(time.perf_counter())
        finally:
            # Interrupted or not, nothing of this stays in the queue; Snakemake only cancels what it has noted.
            time.sleep(1)
            stop = time.perf_counter()
            process.send_signal(signal.SIGINT)
            process.communicate()
            cancelled = time.perf_counter() - stop
    if len(times) < wanted:
        sys.exit(f"{''.join(said)}\nonly {len(times)} of {wanted} jobs were submitted")
    each = (times[-1] - times[0]) / (wanted - 1)
    print(f"\n{wanted} jobs: the first submitted after {times[0] - start:.1f} s, the others {each:.3f} s each;")
    print(f"cancelled by Ctrl-C in {cancelled:.1f} s", flush=True)


def _joined(words: Sequence[str]) -> list[str]:
    """Options of Snakemake with the values of one that was given twice put together: the last would hide the others."""
    values: dict[str, list[str]] = {}
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word
            values.setdefault(option, [])
        else:
            values[option].append(word)
    return [word for option, given in values.items() for word in (option, *given)]


def print_reproduction(tflops: float) -> None:
    """How long the full-size studies take together."""
    from consistency.layout import Layout
    from consistency.stages.estimate import Job, estimate, print_days
    from consistency.study import load_study

    jobs: dict[str, Job] = {}
    for name in FULL_SIZE:
        for job, found in estimate(load_study(ROOT / f"config/studies/{name}.yaml"), Layout(name)).jobs.items():
            after = tuple(f"{name} {before}" for before in found.after)
            jobs[f"{name} {job}"] = dataclasses.replace(found, after=after)
    hour = tflops * 1e12 * 3600
    total = sum(job.operations for job in jobs.values()) / hour
    print(f"\n{', '.join(FULL_SIZE)}: {len(jobs)} jobs, {total:,.0f} GPU-hours at {tflops:g} TFLOP/s sustained")
    print_days(jobs, hour)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tflops", type=float, default=100.0)
    parser.add_argument("--slurm", nargs=argparse.REMAINDER, metavar="WORD", help="measure Slurm's part too")
    args = parser.parse_args()
    print_plans(args.studies, args.seeds)
    if args.slurm is not None:
        print_jobs(args.slurm)
        print_submission(args.slurm, args.seeds)
    print_reproduction(args.tflops)
    print(f"\nMeasured on {hardware()['processor']}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
