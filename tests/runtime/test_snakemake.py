"""Snakemake as make and DVC start it: alone, going on after a killed run, and no longer than its caller."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tests.conftest import Tiny
from tests.processes import SOURCE, environment, start_python, wait_until

from consistency.base.errors import UserError
from consistency.runtime.snakemake import AT_WORK, LOCKS, join_run, reproduce


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run, in an empty folder."""
    words: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORES", "3")

    def execute(program: str, command: list[str], environment: dict[str, str]) -> None:
        words.append(command)
        raise SystemExit

    monkeypatch.setattr("os.execve", execute)
    monkeypatch.setattr("subprocess.run", lambda command, **options: words.append(command))
    return words


@pytest.mark.parametrize(
    ("rules", "targets", "said"),
    [
        (None, [], "studies=tiny --"),
        (["student", "resource"], ["a", "b"], "studies=tiny --allowed-rules student resource -- a b"),
    ],
)
def test_what_snakemake_is_told(
    tiny: Tiny, started: list[list[str]], rules: list[str] | None, targets: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        reproduce(tiny(), rules, targets)
    (words,) = started
    assert " ".join(words[1:]) == f"-m snakemake --cores 3 --config {said}"


def leave_a_lock() -> None:
    """What a Snakemake that is at work, or was killed, has in its folder."""
    LOCKS.mkdir(parents=True)
    (LOCKS / "0.input.lock").touch()


def test_a_killed_run_is_unlocked(tiny: Tiny, started: list[list[str]]) -> None:
    leave_a_lock()
    with pytest.raises(SystemExit):
        reproduce(tiny(), None, [])
    assert "--unlock" in started[0] and "--unlock" not in started[1]


def test_a_cluster_is_unlocked_by_hand(tiny: Tiny, started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    leave_a_lock()
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "slurm")
    with pytest.raises(UserError, match="when `squeue --me` has none of this directory, run `snakemake --unlock`"):
        reproduce(tiny(), None, [])
    assert started == []


def test_another_run_is_not_disturbed(
    tiny: Tiny, started: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consistency.runtime.snakemake.PATIENCE", 0.0)
    leave_a_lock()
    other = start_python("-c", OTHER)
    try:
        wait_until(Path("joined").exists, "the other run")
        with pytest.raises(UserError, match="another run is at work in this directory: wait until it ends, or stop it"):
            reproduce(tiny(), None, [])
        assert started == []
        assert len(capsys.readouterr().out.splitlines()) == 1
    finally:
        other.kill()
        other.wait()
    with pytest.raises(SystemExit):
        reproduce(tiny(), None, [])
    assert "--unlock" in started[0]


def test_dry_runs_beside_a_run_are_allowed(started: list[list[str]]) -> None:
    join_run()
    join_run()


def test_a_disk_without_locks_is_one_line(
    tiny: Tiny, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    join_run()
    with pytest.raises(UserError, match=f"cannot lock {AT_WORK}: Function not implemented; work on a disk that has"):
        reproduce(tiny(), None, [])


OTHER = """
import pathlib, time
from consistency.runtime.snakemake import join_run
join_run()
pathlib.Path("joined").touch()
time.sleep(60)
"""
CALLER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind a shell's &
os.environ["CONSISTENCY_CALLER"] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""
SNAKEMAKE = """
import subprocess
from consistency.runtime.snakemake import join_run
join_run()
subprocess.run(["bash", "-c", "sleep 60; true"])
"""


def test_snakemake_and_its_jobs_end_with_the_caller(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CALLER, SNAKEMAKE]
    caller = subprocess.Popen(words, cwd=tmp_path, start_new_session=True, env=environment(PYTHONPATH=SOURCE))

    def at_work() -> list[str]:
        shown = subprocess.run(["ps", "-o", "args=", "-g", str(caller.pid)], capture_output=True, text=True)
        return [line for line in shown.stdout.splitlines() if "defunct" not in line]

    try:
        wait_until(lambda: len(at_work()) == 4, "four processes")
        caller.kill()
        caller.wait()
        wait_until(lambda: not at_work(), "their end")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(caller.pid, signal.SIGKILL)
