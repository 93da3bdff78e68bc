"""One process at a time, where the disk can tell."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tests.dangers import refused
from tests.processes import start_python

from consistency.base import locks
from consistency.base.errors import UserError
from consistency.base.locks import held, only_one


def test_a_second_process_waits_and_then_is_told_whose_the_folder_is_until_that_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state"
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    code = (
        "import sys, time; from pathlib import Path; from consistency.base.locks import only_one\n"
        "with only_one(Path(sys.argv[1]), 'is working'): print(flush=True); time.sleep(60)"
    )
    with start_python("-c", code, folder) as other:
        assert other.stdout is not None and other.stdout.readline()
        whose = rf"another process \(pid {other.pid} on \S+\) is working in {folder}: wait for it or stop it"
        with pytest.raises(UserError, match=whose), only_one(folder, "is working"):
            pass
        other.send_signal(signal.SIGKILL)
    assert capsys.readouterr().out.count(f"is working in {folder}: waiting for it\n") == 1
    with only_one(folder, "is working"):
        assert (folder / "lock").read_text().startswith(f"pid {os.getpid()} on ")
    assert not folder.exists()


def test_many_take_turns_in_a_folder_that_each_removes(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        with only_one(tmp_path / "state", "is working"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, os.listdir(tmp_path)) == ([1], [])


def test_a_disk_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre may be mounted without them; no lock of another kind is taken in its place."""
    monkeypatch.setattr("fcntl.flock", refused(errno.ENOSYS))
    message = r"does not support file locks \(Function not implemented\), .*: mount it with them"
    with pytest.raises(UserError, match=message), only_one(tmp_path / "state", "is working"):
        pass


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    path = tmp_path / "state/lock"
    with (
        pytest.raises(UserError, match=rf"cannot write {path}: .* exists; mend it"),
        held(path, "", advice="; mend it"),
    ):
        pass
