"""Snakemake as DVC runs it: not beside another run, and not after its caller is gone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from consistency.__main__ import main
from consistency.errors import UserError
from consistency.workflow import LOCKS, run_rules


@pytest.fixture
def other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like Snakemake at work here, and its lock."""
    monkeypatch.chdir(tmp_path)
    LOCKS.mkdir(parents=True)
    (LOCKS / "0.input.lock").touch()
    process = subprocess.Popen(["bash", "-c", "exec -a snakemake sleep 60"])
    yield process
    process.kill()
    process.wait()


def test_another_run_is_not_disturbed(other_run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while b"snakemake" not in Path(f"/proc/{other_run.pid}/cmdline").read_bytes()[:10] and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"wait until it ends, or stop it: kill {other_run.pid}$"):
        run_rules("tiny", ["dataset"], ["results/tiny/dataset/images.npy"], patience=0)
    assert (LOCKS / "0.input.lock").exists()


@pytest.mark.parametrize(("run", "student"), [(None, []), ("gc-full", ["student=gc-full"])])
def test_snakemake_is_told_which_student_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str | None, student: list[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("consistency.workflow._supervised", lambda command: started.append(command) or 0)
    assert run_rules("tiny", ["student", "resource"], ["a", "b"], run) == 0
    words = started[0]
    assert words[words.index("--config") + 1 : words.index("--allowed-rules")] == ["studies=tiny", *student]
    assert words[words.index("--allowed-rules") + 1 :] == ["student", "resource", "--", "a", "b"]


def test_no_student_is_trained_before_dvc_knows_what_it_is_made_from(
    write_study: Callable[..., Path],
    couplings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("consistency.workflow._supervised", lambda command: 7)
    frozen = {"varies": ["coupling", "mu", "predictor"], "students.gc.predictor": {"run": "ic"}}
    words = ["reproduce", "--study", str(write_study(couplings | frozen)), "--rules", "student", "resource"]
    words += ["--run", "gc", "--seed", "0", "--", "student.safetensors"]
    Path("dvc.yaml").write_text("vars: [config/studies/tiny.yaml, frozen: []]")
    assert main(words) == 2
    assert "under vars, write `- frozen: [{run: gc, predictor: ic}]`" in capsys.readouterr().err
    Path("dvc.yaml").write_text("vars: [config/studies/tiny.yaml, frozen: [{run: gc, predictor: ic}]]")
    with pytest.raises(SystemExit, match="7"):
        main(words)


CALLER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""
SUPERVISOR = """
import sys
from consistency.workflow import _supervised
_supervised(["bash", "-c", "sleep 60; true"])
"""


def test_what_was_started_ends_with_the_caller(tmp_path: Path) -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER, SUPERVISOR], cwd=tmp_path, start_new_session=True)

    def at_work() -> list[str]:
        shown = subprocess.run(
            ["ps", "-o", "args=", "-g", str(caller.pid)], capture_output=True, text=True, check=False
        )
        return [line for line in shown.stdout.splitlines() if line.startswith(("sleep", "bash"))]

    try:
        wait(lambda: len(at_work()) == 2)
        caller.kill()
        caller.wait()
        wait(lambda: not at_work())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(caller.pid, signal.SIGKILL)


def wait(condition: Callable[[], bool], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
