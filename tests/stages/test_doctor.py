"""The doctor: what is wrong is named with what to change, and nobody's password is."""

import fcntl
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from tests.addresses import LOGINS, hidden
from tests.conftest import vouch_for

from consistency import __main__ as cli
from consistency.provenance import environment
from consistency.runtime.snakemake import AT_WORK, LOCKS
from consistency.stages import doctor

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project, on a machine whose git is asked anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    environment.find_commit.cache_clear()
    yield tmp_path
    environment.find_commit.cache_clear()


def told(capsys: pytest.CaptureFixture[str], name: str, code: int = 0, whole: bool = False) -> list[str]:
    """The lines of one check, alone or among all, in a run of the verb that ends with that code."""
    with pytest.MonkeyPatch.context() as patch:
        if whole:  # the tests' Slurm, if there is one, does not answer
            patch.setattr(doctor, "partition_limits", lambda patience: {})
        else:
            patch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name]})
        assert cli.main(["doctor"]) == code
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert {line.split()[0] for line in lines} <= {"ok", "note", "wrong"}
        assert {line.split()[1] for line in lines} == set(doctor.CHECKS)
    wrong = sum(line.startswith("wrong") for line in lines)
    assert err == (f"error: {wrong} wrong: each line above that begins with `wrong` says what to change\n" * (code > 0))
    return [line for line in lines if line.split()[1] == name]


def test_a_good_machine_is_0_and_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = told(capsys, "mlflow", whole=True)
    assert line == f"note  mlflow     sqlite:///{folder}/mlflow.db is not there yet: the first run makes it"
    assert list(folder.iterdir()) == []


def test_other_packages_than_the_locks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    lock = "numpy==0.1 \\\n    --hash=x\nnowhere==1 ; python_version >= '3' \\\n    --hash=x\nother==1 ; os_name == 'x'"
    Path("requirements.lock").write_text(f"{lock}\nPyYAML=={version('pyyaml')}\n", encoding="utf-8")
    _, line = told(capsys, "python", 2)
    assert f"2 packages are not those of requirements.lock: numpy==0.1 (here {version('numpy')}), nowhere==1" in line
    assert line.endswith("run `uv pip sync requirements.lock`")


def test_a_missing_git_is_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    (line,) = told(capsys, "git")
    assert line.startswith("note  git        results will name no commit of the code: ") and "'git'" in line


def test_a_wrong_digest_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("resources/weights.pt")
    file.parent.mkdir()
    file.write_bytes(b"right")
    vouch_for(file)
    assert told(capsys, "resources")[0].endswith("1 files of resources/ are right: weights.pt")
    file.write_bytes(b"wrong")
    line = told(capsys, "resources", 2)[0]
    assert line.startswith("wrong resources  resources/weights.pt is damaged: has sha256 ")
    assert line.endswith("run `python -m consistency fetch weights.pt`")


def test_a_place_that_cannot_be_written_or_locked_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("state").symlink_to("/nowhere/scratch")
    lines = told(capsys, "disk", 2)
    assert [line for line in lines if line.startswith("wrong") and "state: " in line and "No such file" in line]
    Path("state").unlink()

    def refuse(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(doctor.fcntl, "flock", refuse)
    here, *_, shared = told(capsys, "disk", 2)
    assert here.startswith("wrong") and "cannot be written or locked (Function not implemented)" in here
    assert shared.startswith("note  disk       shared memory: /dev/shm")


@pytest.mark.parametrize("address", [f"http://{LOGINS[0]}", f"postgresql://{LOGINS[2]}", LOGINS[1], "sqlite:///x.db"])
def test_an_mlflow_that_cannot_be_used_is_masked(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("x.db").write_text("no database " * 100, encoding="utf-8")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    (line,) = told(capsys, "mlflow", 2)
    assert hidden(line).startswith("wrong")
    assert "x.db" in line or "127.0.0.1" in line


def test_a_store_and_a_remote_are_masked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sqlite3.connect("mlflow.db").close()
    Path("mlflow.db").touch()
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("['remote \"group\"']\n    url = ssh://me:hunter2@host/data\n", encoding="utf-8")
    found = told(capsys, "dvc")
    assert found[0] == "ok    dvc        remote group: ssh://host/data"
    assert told(capsys, "mlflow") == [f"ok    mlflow     sqlite:///{folder}/mlflow.db answers"]


def test_a_slurm_that_does_not_answer_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, body in {"sbatch": "", "sinfo": "echo no controller >&2; exit 1"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (line,) = told(capsys, "slurm", 2)
    assert "Slurm does not answer (no controller)" in line


def test_a_run_at_work_and_a_killed_one_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    LOCKS.mkdir(parents=True)
    (LOCKS / "0.input.lock").touch()
    assert "a run was killed" in told(capsys, "runs")[0]
    with AT_WORK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert "Snakemake is at work" in told(capsys, "runs")[0]


def test_a_driver_that_torch_cannot_use_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia", lambda: ("470.1", ["H100"]))
    assert "driver 470.1: H100" in told(capsys, "gpu", 2)[0]


def test_a_check_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[doctor.Finding]:
        yield "ok", "so far"
        raise subprocess.SubprocessError("ended")

    monkeypatch.setitem(doctor.CHECKS, "git", broken)
    assert [line.split()[0] for line in told(capsys, "git", 2, whole=True)] == ["ok", "wrong"]
