"""A checkout on the login node of a cluster: what its Snakemake submits, and what becomes of it there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import psutil
import yaml
from tests.processes import start_in, wait_until
from tests.workflow.checkout import Checkout
from tests.workflow.slurm.cluster import Cluster

PROFILE = Path("workflow/profiles/slurm/config.yaml")
#: what somebody edits in the profile for a cluster of two small nodes that keeps no accounts
SITE: dict[str, Any] = {
    "slurm-status-command": "squeue",
    "slurm-init-seconds-before-status-checks": 3,
    "latency-wait": 20,
}


@dataclass(frozen=True)
class LoginNode(Checkout):
    """A checkout with a profile for the cluster of the tests."""

    cluster: Cluster = field(kw_only=True)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """The literal command, for a study of the tests; its output goes to output.txt. words: options, then targets
        after --."""
        command = ["snakemake", "--cores", "all", "--profile", "slurm", "--config", f"studies={self.study}"]
        return start_in(self.path, [*command, *words], self.environment, self.path / "output.txt")

    @contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Start it; if it is still at work at the end of the block, it is interrupted."""
        run = self.start(*words)
        try:
            yield run
        finally:
            self.interrupt(run)

    def run(self, *words: str) -> int:
        """Run it to its end. Returns its exit code."""
        with self.running(*words) as run:
            return run.wait(600)

    def site(self, settings: dict[str, Any] | None = None, **rules: dict[str, Any]) -> Self:
        """Edit the profile: its settings, and the resources of rules."""
        file = self.path / PROFILE
        content = yaml.safe_load(file.read_text()) | (settings or {})
        for resources in content["set-resources"].values():
            if "gres" in resources:
                resources["gres"] = "gpu:1"
        for rule, resources in rules.items():
            content["set-resources"].setdefault(rule, {}).update(resources)
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return self

    def with_variables(self, **variables: str) -> Self:
        return replace(self, variables=self.variables | variables)

    def jobs(self, name: str = "") -> list[dict[str, str]]:
        """Slurm's fields of the jobs of this checkout whose rule and wildcards hold a name, oldest first."""
        jobs = [job for job in self.cluster.jobs() if job["WorkDir"] == str(self.path)]
        return [job for job in jobs if name in job["Comment"]]

    def queued(self) -> list[str]:
        """The states of those that wait or run."""
        ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT")
        return [job["JobState"] for job in self.jobs() if job["JobState"] not in ended]

    def student(self, run: str) -> str:
        """The target that a student is."""
        return f"results/{self.study}/students/{run}/seed0/student.safetensors"

    def log(self, run: str) -> str:
        """The output of the last job of a student."""
        return (self.path / f"logs/{self.study}/student/{run}-seed0.log").read_text()

    def trainers(self, run: str) -> list[psutil.Process]:
        """The processes that train a student."""
        found = ((process, process.info["cmdline"] or []) for process in self.processes())
        return [each for each, words in found if words[1:2] != ["-c"] and {"consistency", "student", run} <= set(words)]

    def freeze(self, *runs: str, step: int = 100) -> dict[str, list[psutil.Process]]:
        """Stop the clock of each training once it has passed a step: it stands as before a slow disk, and what takes
        time can be waited for without training on. Returns their processes; thaw them."""
        frozen: dict[str, list[psutil.Process]] = {}

        def freeze_next() -> bool:
            for run in set(runs) - set(frozen):
                if self.step(run) >= step and (trainers := self.trainers(run)):
                    frozen[run] = trainers
                    for process in trainers:
                        process.suspend()
            return len(frozen) == len(runs)

        wait_until(freeze_next, f"step {step} of {', '.join(runs)}", 300)
        return frozen


def login(checkout: Checkout, cluster: Cluster) -> LoginNode:
    """A checkout as it is after the login on the cluster: the commands on PATH, the profile's block edited."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{cluster.path}"
    node = LoginNode(checkout.path, checkout.study, checkout.variables | {"PATH": path}, cluster=cluster)
    return node.site(SITE)


def thaw(trainers: list[psutil.Process]) -> None:
    for trainer in trainers:
        # Slurm may have killed it meanwhile.
        with suppress(psutil.NoSuchProcess):
            trainer.resume()


def thaw_when_called(trainers: list[psutil.Process], signum: int) -> None:
    """Wait until a signal waits for one of the frozen processes, and let them go on."""
    wait_until(lambda: any(_called(trainer, signum) for trainer in trainers), f"signal {signum}", 150)
    thaw(trainers)


def _called(process: psutil.Process, signum: int) -> bool:
    """Tell whether a signal waits for a process, or the process is gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending.split()[1], 16) >> (signum - 1) & 1)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The files that only one side has, and those that say something else."""
    return sorted(name for name in set(found) | set(expected) if found.get(name) != expected.get(name))
