"""GPUs are handed out to the jobs of one machine without collision; no GPU is needed to see it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
def four_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine that says it has four, with locks of its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield
    for lock in launch._held:
        lock.close()
    launch._held.clear()


def job(count: int) -> subprocess.Popen[str]:
    """Another process that takes so many GPUs, says which, and keeps them until it is told to end."""
    command = [sys.executable, "-c", JOB, str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


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
    launch.claim_gpus(3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"


def test_what_a_job_starts_keeps_its_gpus(tmp_path: Path) -> None:
    """A worker of a killed torchrun may still be saving."""
    code = JOB.replace("sys.stdin.readline()", "import subprocess; subprocess.Popen(['sleep', '61'], close_fds=False)")
    done = subprocess.run([sys.executable, "-c", code, "4"], stdout=subprocess.DEVNULL, check=True, timeout=60)
    assert done.returncode == 0
    folder = next(tmp_path.glob("consistency-gpus-*"))
    assert launch._try_lock(folder / "0.lock") is None
    subprocess.run(["pkill", "-f", "^sleep 61$"], check=True)


def test_more_gpus_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--processes 5 needs 5 GPUs, this job sees 4 \(0, 1, 2, 3\)"):
        launch.claim_gpus(5)


def test_under_slurm_the_gpus_are_the_jobs_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There, two jobs may both be told '0' and have different ones."""
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
def test_the_gpus_of_a_request(gres: str, gpus: int) -> None:
    assert launch.gpus_of_gres(gres) == gpus
