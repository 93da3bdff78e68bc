"""One process at a time, where the disk can tell."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from consistency.errors import UserError
from consistency.locks import held, only_one


def test_a_disk_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre mounted without them."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = r"has no file locks \(Function not implemented\), .*: have it mounted with them"
    with pytest.raises(UserError, match=message), only_one(tmp_path / "state", "is working", 0.0):
        pass
    with pytest.raises(UserError, match=message), held(tmp_path / "lock", "waiting"):
        pass
