"""GPUs are handed out to the jobs of one machine without collision; no GPU is needed to see it."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.dangers import refused
from tests.processes import run_python, start_python

from consistency.base.errors import UserError
from consistency.runtime import launch
from consistency.runtime.slurm_job import OWN

JOB = """
import os, sys
from consistency.runtime import launch
if len(sys.argv) > 2:
    os.umask(0o077)
    os.setuid(int(sys.argv[2]))
launch.claim_gpus(int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.readline()
"""


#: names that no GPU has: their locks lie where those of all users do
GPUS = [f"test-{os.getpid()}-{k}" for k in range(4)]
ALL = "0,1,2,3"


def locks() -> list[Path]:
    return sorted(launch.LOCKS.glob(f"consistency-gpu-{GPUS[0][:-1]}*"))


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that says it has four."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    yield
    for lock in locks():
        lock.unlink()


def job(count: int, *user: int, **variables: str) -> subprocess.Popen[str]:
    """Another process that takes so many GPUs, says which, and keeps them until it is told to end."""
    return start_python("-c", JOB, count, *user, **variables)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip().replace(GPUS[0][:-1], "")


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=30)


def test_jobs_get_different_gpus_and_give_them_back() -> None:
    first, second = job(2), job(1)
    taken = [name for process in (first, second) for name in said(process).split(",")]
    assert len(taken) == len(set(taken)) == 3
    third = job(2)
    assert said(third).startswith("waiting for 2 of 4 GPUs")
    end(second)
    free = said(third).split(",")
    assert len(free) == len(set(free) - set(taken[:2])) == 2
    end(first)
    end(third)


def test_a_killed_job_gives_its_gpus_back() -> None:
    first = job(4)
    assert said(first) == ALL
    first.kill()
    first.communicate()
    second = job(3)
    assert said(second) == "0,1,2"
    end(second)


def test_what_a_job_starts_keeps_its_gpus() -> None:
    """A worker of a killed torchrun may still be saving."""
    sleep = "import subprocess as s; p = s.Popen(['sleep', '60'], close_fds=False, stdout=s.DEVNULL, stderr=s.DEVNULL)"
    gpus, worker = run_python("-c", JOB.replace("sys.stdin.readline()", f"{sleep}; print(p.pid)"), 4).stdout.split()
    assert gpus == ",".join(GPUS)
    second = job(1)
    assert said(second) == "waiting for 1 of 4 GPUs: other jobs hold 4"
    os.kill(int(worker), signal.SIGKILL)
    assert said(second) == "0"
    end(second)


def test_more_gpus_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--processes 5 needs 5 GPUs, this job sees 4 \(test-.*-0, .*-3\)"):
        launch.claim_gpus(5)


def test_the_gpus_of_a_rules_own_slurm_job_need_no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Slurm two jobs may both be told '0' and have different ones."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(OWN, "7 4")
    launch.claim_gpus(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(GPUS[:2])
    assert locks() == []


def test_a_disk_without_locks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", refused(errno.ENOLCK))
    with pytest.raises(UserError, match=r"cannot lock .*-gpu-.*: No locks available; mend"):
        launch.claim_gpus(1)


@pytest.mark.parametrize("own", ["", "6 4"])
def test_jobs_that_share_an_allocation_share_its_gpus(own: str) -> None:
    """As under the local executor within salloc, or in a group job; the second is another Slurm job's note."""
    jobs = [job(1, SLURM_JOB_ID="7", **{OWN: own}) for _ in range(2)]
    assert {said(each) for each in jobs} == {"0", "1"}
    for each in jobs:
        end(each)


def test_the_gpus_of_two_allocations_are_told_apart() -> None:
    """Each counts its own from 0, and Slurm says which they are on the machine."""
    jobs = [job(1, CUDA_VISIBLE_DEVICES="0", SLURM_JOB_ID=number, SLURM_JOB_GPUS=GPUS[k])
            for k, number in enumerate("78")]  # fmt: skip
    assert [said(each) for each in jobs] == ["0", "0"]
    for each in jobs:
        end(each)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two users")
def test_two_users_get_different_gpus(tmp_path: Path) -> None:
    """Each has a TMPDIR and a strict umask of his own."""
    first, second = job(1, 65534, TMPDIR="/tmp"), job(1, 1, TMPDIR=str(tmp_path))
    assert {said(first), said(second)} == {"0", "1"}
    locks()[0].chmod(0o444)
    end(first)
    end(second)
    third = job(1, 2)
    assert said(third) == "0"
    end(third)


@pytest.mark.parametrize(
    ("cpus", "asked"),
    [
        ({"SLURM_CPUS_PER_TASK": "8"}, "--cpus-per-task=8"),
        ({OWN: "7 4"}, "--cpus-per-task=4"),
        ({OWN: "6 4"}, "--cpu-bind=none"),
    ],
)
def test_each_nodes_task_gets_the_cpus_of_the_job(
    cpus: dict[str, str], asked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\n')
    (tmp_path / "srun").chmod(0o755)
    script = "from consistency.runtime.launch import run_on_nodes; run_on_nodes(2, ['student'])"
    run_python("-c", script, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7", **cpus)
    assert f" {asked} --export=ALL {sys.executable}" in (tmp_path / "words").read_text()


@pytest.mark.parametrize("start", ["run_on_nodes(2, [])", "run_processes(2, [])"])
def test_launchers_leave_an_ignored_signal_ignored(start: str, tmp_path: Path) -> None:
    """As by nohup; torchrun is told which signals it may handle."""
    (tmp_path / "srun").symlink_to("/bin/true")
    script = (
        "import signal, torch.distributed.run as torchrun; from consistency.runtime.launch import *; "
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); torchrun.main = print; "
        f"{start}; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    )
    done = run_python("-c", script, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7").stdout
    assert done.endswith("True\n")
    assert "SIGHUP" not in done


@pytest.mark.parametrize("none", ["", "-1", "NoDevFiles"])
def test_a_job_that_sees_no_gpu_claims_none(monkeypatch: pytest.MonkeyPatch, none: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
    launch.claim_gpus(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == none
    assert locks() == []


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("", 0), ("gpu", 1), ("gpu:4", 4), ("gpu:a100:8", 8), ("gpu:h200", 1), ("nvme:2", 0), ("shard:4", 0)],
)
def test_a_request_names_its_gpus(gres: str, gpus: int) -> None:
    assert launch.gpus_of_gres(gres) == gpus
