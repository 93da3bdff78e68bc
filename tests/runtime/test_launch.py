"""GPUs are handed out to the jobs of one machine without collision; no GPU is needed to see it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.processes import run_python, start_python

from consistency.base.errors import UserError
from consistency.runtime import launch

JOB = """
import os, sys
from consistency.runtime.launch import claim_gpus
claim_gpus(int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that says it has four, with locks of its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def job(count: int) -> subprocess.Popen[str]:
    """Another process that takes so many GPUs, says which, and keeps them until it is told to end."""
    return start_python("-c", JOB, count)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


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
    assert said(first) == "0,1,2,3"
    first.kill()
    first.communicate()
    second = job(3)
    assert said(second) == "0,1,2"
    end(second)


def test_what_a_job_starts_keeps_its_gpus() -> None:
    """A worker of a killed torchrun may still be saving."""
    sleep = "import subprocess as s; p = s.Popen(['sleep', '60'], close_fds=False, stdout=s.DEVNULL, stderr=s.DEVNULL)"
    gpus, worker = run_python("-c", JOB.replace("sys.stdin.readline()", f"{sleep}; print(p.pid)"), 4).stdout.split()
    assert gpus == "0,1,2,3"
    second = job(1)
    assert said(second) == "waiting for 1 of 4 GPUs: other jobs hold 4"
    os.kill(int(worker), signal.SIGKILL)
    assert said(second) == "0"
    end(second)


def test_more_gpus_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--processes 5 needs 5 GPUs, this job sees 4 \(0, 1, 2, 3\)"):
        launch.claim_gpus(5)


def test_under_slurm_the_gpus_are_the_jobs_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under Slurm two jobs may both be told '0' and have different ones."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    launch.claim_gpus(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("none", ["", "-1", "NoDevFiles"])
def test_a_job_that_sees_no_gpu_claims_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, none: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
    launch.claim_gpus(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == none
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("", 0), ("gpu", 1), ("gpu:4", 4), ("gpu:a100:8", 8), ("gpu:h200", 1), ("nvme:2", 0), ("shard:4", 0)],
)
def test_a_request_names_its_gpus(gres: str, gpus: int) -> None:
    assert launch.gpus_of_gres(gres) == gpus
