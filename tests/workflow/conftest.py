"""One finished run of the tiny study is shared; tests copy it to change it."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from tests.workflow.checkout import Checkout, fresh


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return fresh(tmp_path / "checkout")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished run of tiny, shared by all tests (and pytest's workers): copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = base / "finished.done"
        if not marker.exists():
            shutil.rmtree(base / "finished", ignore_errors=True)
            output = fresh(base / "finished").done()
            marker.write_text(output)
    return Checkout(base / "finished")


@pytest.fixture
def copied(finished: Checkout, tmp_path: Path) -> Checkout:
    """A finished run of one's own."""
    return finished.copy(tmp_path / "copied")
