"""One finished run of the tiny study is shared; tests copy it to change it."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from tests.workflow.checkout import LONGER, Checkout, fresh, job_of, processes_in, scored
from tests.workflow.dvc_repo import JOBS, PLAN, origin
from tests.workflow.miniatures import Site, serving

from consistency.__main__ import main
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.provenance.due import mark_due
from consistency.provenance.graph import Artifact, artifacts, downloads, outputs, verb_of
from consistency.runtime.machine import Machine
from consistency.stages.student import make_student

RunVerbs = Callable[[Checkout], int]


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


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that is made once for all of pytest's workers."""
    base = factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base).resolve()
    folder, marker = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not marker.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            marker.touch()
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone in which `dvc repro` ran the tiny study, and then Snakemake what is left: copy it to change it."""

    def make(folder: Path) -> None:
        repo = origin(folder.with_name("origin")).clone(folder)
        assert repo.repro() == JOBS | {PLAN}
        repo.checkout.done()
        assert "1 of 2 steps" in repo.checkout.output and "rule track" in repo.checkout.output
        (folder / "output.txt").unlink()
        repo.commit("reproduced")

    return Checkout(once(tmp_path_factory, "finished", make))


@pytest.fixture(scope="session")
def undisturbed(finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of a longer student that was trained in one go, without Snakemake."""

    def make(folder: Path) -> None:
        checkout = finished.copy(folder).change(LONGER)
        make_student(job_of(checkout, "ctm"), Machine(torch.device("cpu")))

    numbers = scored(Checkout(once(tmp_path_factory, "undisturbed", make)), "ctm")
    assert len(numbers) >= 8
    return numbers


@pytest.fixture
def copied(finished: Checkout, tmp_path: Path) -> Checkout:
    """A finished run of one's own."""
    return finished.copy(tmp_path / "copied")


@pytest.fixture
def run_verbs(handlers: None) -> RunVerbs:
    """run_verbs(checkout): `by_verbs` for a test."""
    return by_verbs


def by_verbs(checkout: Checkout) -> int:
    """Make what is missing or outdated of a study by the verbs, in this process, which imports torch once. Stops at the
    first error. Returns the exit code. `main` sets handlers of signals, so a fixture must bring the tests' own back."""
    file = f"config/studies/{checkout.study}.yaml"
    with chdir(checkout.path):
        job = Job(load_study(file), StudyPaths(checkout.study))
        due = mark_due(job)
        for name, (stage, each) in in_order(job):
            if name not in due and all(path.exists() for path in outputs(stage, each)):
                continue
            fetched = [["fetch", resource] for resource in downloads(each, stage)]
            for words in [*fetched, [*verb_of(stage, each).split(), "--study", file]]:
                if code := main(words):
                    return code
    return 0


def in_order(job: Job) -> list[tuple[str, Artifact]]:
    """The artifacts of a study, parents first: what is no student's, then students, then what is made of both."""

    def rank(item: tuple[str, Artifact]) -> tuple[bool, bool, bool]:
        stage, each = item[1]
        return stage in ("flows", "report"), each.student is not None, bool(each.student and each.settings.frozen)

    return sorted(artifacts(job).items(), key=rank)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty folder whose files are published on the loopback."""
    (tmp_path / "site").mkdir()
    with serving(tmp_path / "site") as published:
        yield published
