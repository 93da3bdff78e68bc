"""One finished run of the tiny study is shared; tests copy it to change it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from tests.workflow.checkout import Checkout, fresh, processes_in
from tests.workflow.miniatures import Site, serving


def end_all_in(folder: Path) -> None:
    """Kill what is still at work in a folder."""
    for process in processes_in(folder.resolve()):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(autouse=True)
def nothing_runs_on(tmp_path: Path) -> Iterator[None]:
    """Processes that a failing test has left at work end with it."""
    yield
    end_all_in(tmp_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the repositories of a module's tests; nothing is at work there in the end."""
    folder = tmp_path_factory.mktemp("dvc").resolve()
    yield folder
    end_all_in(folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout in which nothing has run, in a folder with a space."""
    return fresh(tmp_path / "a checkout")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished run of tiny, shared by all tests and pytest's workers: copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    home, marker = base / "finished", base / "finished.done"
    with FileLock(base / "finished.lock"):
        if not marker.exists():
            shutil.rmtree(home, ignore_errors=True)
            fresh(home).done()
            marker.touch()
    return Checkout(home.resolve())


@pytest.fixture
def copied(finished: Checkout, tmp_path: Path) -> Checkout:
    """A finished run of one's own."""
    return finished.copy(tmp_path / "copied")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty folder whose files are published on the loopback."""
    (tmp_path / "site").mkdir()
    with serving(tmp_path / "site") as published:
        yield published
