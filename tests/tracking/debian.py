"""Debian's packages for a test: installed by it where that is possible, else a reason to skip."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

PATIENCE = 300  # seconds for apt-get


def needs_debian(package: str, command: str) -> str:
    """The path of a command, of whose package's paths the last is taken (PostgreSQL's stand under its version).

    As root the package is installed where it is missing; otherwise the test is skipped.
    """
    found = _find(command)
    if found is None:
        _install(package)
        found = _find(command)
    if found is None:
        pytest.skip(f"needs {command}: apt-get install {package}")
    return found


def _find(command: str) -> str | None:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{command}"), key=lambda path: int(path.parts[-3]))
    return str(versions[-1]) if versions else shutil.which(command)


def _install(package: str) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"needs {package}, which only root can install: apt-get install {package}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # pytest's workers share one lock: the second finds the package installed.
    with FileLock(Path(tempfile.gettempdir()) / "consistency-tests-apt.lock"):
        for words in (["update"], ["install", "-y", "--no-install-recommends", package]):
            try:
                subprocess.run(
                    ["apt-get", "-o", "DPkg::Lock::Timeout=120", *words],
                    env=quiet,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=PATIENCE,
                    check=True,
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
                pytest.skip(f"apt-get {words[0]} {package} failed: {said[-1] if said else error}")
