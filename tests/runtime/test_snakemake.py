"""Snakemake as make and DVC start it: alone, going on after a killed run, and no longer than its caller."""

import errno
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tests.conftest import Tiny
from tests.dangers import refused
from tests.processes import ROOT, SOURCE, environment, run_python, start_in, start_python, wait_until

from consistency.base.errors import UserError
from consistency.runtime.snakemake import AT_WORK, LOCKS, join_run, reproduce


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is at work in the working directory, and no test becomes a Snakemake."""
    monkeypatch.chdir(tmp_path)
    Path("Snakefile").touch()
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("Snakemake was started"))


def told(*words: str) -> list[str]:
    """The words of the verb to Snakemake, which is played by a module that writes them down."""
    program = Path("fake/snakemake/__main__.py")
    program.parent.mkdir(parents=True)
    program.with_name("__init__.py").touch()
    program.write_text("import sys; print(' '.join(sys.argv[1:]), file=open('told', 'a'))", encoding="utf-8")
    verb = ["-m", "consistency", "reproduce", "--study", ROOT / "config/studies/tiny.yaml", *words]
    run_python(*verb, PYTHONPATH=f"fake:{SOURCE}", CORES="3")
    return Path("told").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "studies=[tiny] --"),
        (["--rules", "student", "resource", "--", "a", "b"], "studies=[tiny] --allowed-rules student resource -- a b"),
    ],
)
def test_snakemake_is_told_the_study_the_rules_and_the_targets(words: list[str], said: str) -> None:
    assert told(*words) == [f"--cores 3 --config {said}"]


def test_outside_a_checkout_it_is_said_where_to_run(tiny: Tiny) -> None:
    Path("Snakefile").unlink()
    with pytest.raises(UserError, match="no Snakefile here: run this in a checkout's root, or the stages one by one"):
        reproduce(tiny(), None, [])


def leave_a_lock() -> None:
    """Write what a Snakemake that is at work, or was killed, has in its folder."""
    LOCKS.mkdir(parents=True)
    (LOCKS / "0.input.lock").touch()


def test_a_killed_run_is_unlocked() -> None:
    leave_a_lock()
    assert ["--unlock" in words for words in told()] == [True, False]


def test_a_cluster_is_unlocked_by_hand(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_a_lock()
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "slurm")
    with pytest.raises(UserError, match="when `squeue --me` has none of this directory, run `snakemake --unlock`"):
        reproduce(tiny(), None, [])


def test_another_run_is_not_disturbed(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consistency.runtime.snakemake.PATIENCE", 0.0)
    leave_a_lock()
    with start_python("-c", OTHER) as other:
        try:
            wait_until(Path("joined").exists, "the other run")
            with pytest.raises(UserError, match="another run is at work in this directory: wait until it ends, or"):
                reproduce(tiny(), None, [])
            assert len(capsys.readouterr().out.splitlines()) == 1
        finally:
            other.kill()


def test_dry_runs_beside_a_run_are_allowed() -> None:
    join_run()
    join_run()


def test_a_disk_without_locks_is_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", refused(errno.ENOSYS))
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
import signal, subprocess
from consistency.runtime.snakemake import join_run
join_run()
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
subprocess.run(["bash", "-c", "sleep 60; true"])
"""


def test_snakemake_and_its_jobs_end_with_the_caller(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CALLER, SNAKEMAKE]
    caller = start_in(tmp_path, words, environment(PYTHONPATH=SOURCE), tmp_path / "output.txt")

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
