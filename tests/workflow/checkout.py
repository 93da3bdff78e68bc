"""Copies of this checkout in which the real Snakemake runs the tiny study."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import psutil
import torch
import yaml
from tests.conftest import Changes, put
from tests.processes import ROOT, environment, run_python, start_in, wait_until
from tests.repeatable import repeatable

from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.stages.samples import make_samples
from consistency.stages.scores import make_scores

COPIED = ["Snakefile", "Makefile", "environment.yml", "config", "profiles", "slurm", "workflow", "src"]
#: the files of results that the same study has bit for bit
NUMBERS = ["dataset/*.npy", "**/*.safetensors", "**/*.npz", "**/*.csv", "samples/**/*.npy", "**/history.jsonl"]
#: a student that trains long enough to be disturbed
LONGER: dict[str, Any] = {"student.steps": 1000, "student.snapshot_every": 500, "student.log_every": 20}


@dataclass(frozen=True)
class Checkout:
    """A copy of the project in which Snakemake may run."""

    path: Path
    study: str = "tiny"
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The outside's, without what a surrounding workflow, make or MLflow would bring in."""
        # Snakemake asks an installed Slurm at every start; one that is not running answers after 9 seconds.
        # A job with simulated GPUs, or one per process, computes on the CPU, and says so.
        return environment(CONSISTENCY_DEVICE="cpu") | self.variables

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Snakemake in a process group of its own, as a shell starts it; its output goes to output.txt."""
        return self._start("snakemake", "--cores", "2", *words, "--config", f"studies={self.study}")

    def reproduce(self, *targets: str) -> subprocess.Popen[str]:
        """The same as make and DVC start it: it becomes Snakemake."""
        return self._start("consistency", "reproduce", "--study", f"config/studies/{self.study}.yaml", "--", *targets)

    def _start(self, *words: str) -> subprocess.Popen[str]:
        environment = {"PYTHONPATH": str(self.path / "src"), "CORES": "2"} | self.environment
        return start_in(self.path, [sys.executable, "-m", *words], environment, self.path / "output.txt")

    def verb(self, *words: str) -> str:
        """Run a verb, which must end well. Returns what it printed."""
        variables = {"PYTHONPATH": str(self.path / "src")} | self.variables
        return run_python("-m", "consistency", *words, folder=self.path, **variables).stdout

    @property
    def output(self) -> str:
        file = self.path / "output.txt"
        return file.read_text() if file.exists() else ""

    def interrupt(self, run: subprocess.Popen[str]) -> int:
        """Press Ctrl-C if it is at work, and wait for its end, on a cluster for its next look at the jobs. Returns its
        exit code."""
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGINT)
        return run.wait(600)

    def run(self, *words: str) -> int:
        """Run Snakemake to its end. Returns its exit code."""
        return self.start(*words).wait(timeout=600)

    def done(self, *words: str) -> str:
        """Run Snakemake, which must end well. Returns its output."""
        code = self.run(*words)
        assert code == 0, self.output
        return self.output

    def planned(self, *words: str) -> set[str]:
        """The jobs of a dry run, such as 'student ctm'; without `all`."""
        blocks = re.findall(r"(?m)^(?:local)?rule (\w+):\n((?:    .*\n)*)", self.done("-n", *words))
        runs = [(name, re.search(r"student=([\w-]+)", text)) for name, text in blocks if name != "all"]
        return {f"{name} {run[1]}" if run else name for name, run in runs}

    def change(self, changes: Changes, name: str = "tiny") -> Self:
        """Set dotted keys of the study, here or in a copy of another name."""
        file = self.path / f"config/studies/{self.study}.yaml"
        content = put(yaml.safe_load(file.read_text()), {"name": name, **changes})
        file.with_name(f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return replace(self, study=name)

    def copy(self, path: Path) -> Self:
        return replace(self, path=shutil.copytree(self.path, path, symlinks=True), variables=dict(self.variables))

    def step(self, run: str) -> int:
        """The last step in the history of a student's training at work; 0 before there is one."""
        try:
            history = self.path / f"state/{self.study}/{run}/seed0/history.jsonl"
            return int(json.loads(history.read_text().splitlines()[-1])["step"])
        except (OSError, ValueError, IndexError):
            return 0

    def litter(self) -> list[Path]:
        """Temporary files that nobody removed."""
        folders = [self.path / name for name in ("results", "state", "logs")]
        return [file for folder in folders for file in folder.rglob("*.tmp")]

    def states(self) -> list[Path]:
        """The files of trainings and samplings that go on; the marks of what is due are none."""
        files = (file for file in (self.path / "state").rglob("*") if file.is_file())
        return [file for file in files if "due" not in file.relative_to(self.path).parts]

    def reaches(self, run: subprocess.Popen[str], step: int) -> None:
        """Wait until the student ctm of a run has passed that step."""
        wait_until(lambda: self.step("ctm") >= step or run.poll() is not None, f"step {step}")
        assert run.poll() is None, self.output

    def ends(self, run: subprocess.Popen[str]) -> None:
        """Wait for the end of every process of a stopped run, Snakemake too, which nobody waits for until then."""
        wait_until(lambda: self.processes() == [], "the end of every process")
        assert run.wait(timeout=60) != 0

    def processes(self) -> list[psutil.Process]:
        """Processes at work in this copy."""
        return processes_in(self.path)

    def results(self, *patterns: str) -> dict[str, Any]:
        """The contents of the result files of those patterns, without what no run can repeat: times and speeds."""
        root = self.path / "results" / self.study
        return {str(file.relative_to(root)): repeatable(file) for pattern in patterns for file in root.glob(pattern)}


def processes_in(folder: Path) -> list[psutil.Process]:
    """Processes at work in a folder or below it."""
    found = psutil.process_iter(["cwd", "cmdline"])
    return [process for process in found if Path(process.info["cwd"] or "/").is_relative_to(folder)]


def fresh(path: Path, *more: str) -> Checkout:
    """A copy of the files of this checkout that the workflow needs, and of more."""
    for name in (*COPIED, *more):
        source = ROOT / name
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, path / name, symlinks=True)
        else:
            shutil.copy2(source, path / name, follow_symlinks=False)
    return Checkout(path.resolve())


def as_module(folder: Path, clone: Path) -> None:
    """Write the Snakefile that docs/module.md has for a clone."""
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs/module.md").read_text(), re.DOTALL)
    (folder / "workflow").mkdir(exist_ok=True)
    (folder / "workflow/Snakefile").write_text(code.replace("CLONE", str(clone)))


def job_of(checkout: Checkout, student: str, seed: int = 0) -> Job:
    """The job of a student of a checkout, for the stages in this process."""
    study = load_study(checkout.path / f"config/studies/{checkout.study}.yaml")
    return Job(study, StudyPaths(study.name, checkout.path / "results", checkout.path / "state"), student, seed)


def scored(checkout: Checkout, run: str) -> dict[str, Any]:
    """The numbers that a student is and makes: its weights at all snapshots, its history, and, drawn and scored here,
    its samples and scores. Its name is taken out."""
    for make in (make_samples, make_scores):
        make(job_of(checkout, run), torch.device("cpu"))
    numbers = ["students/{}/**/*.safetensors", "students/{}/**/*.jsonl", "samples/{}/**/*.npy", "scores/{}/*.csv"]
    found = checkout.results(*(pattern.format(run) for pattern in numbers))
    tables = {name for name in found if name.endswith(".csv")}
    found |= {name: found[name].replace(run.encode(), b"") for name in tables}
    return {name.replace(f"/{run}/", "/"): value for name, value in found.items()}
