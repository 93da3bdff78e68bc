"""The tiny study's first results in folders of one's own, a finished study, images to prepare, untrained students."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Changes, Tiny, mistake
from tests.draws import seeded
from tests.made import make_all

from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.data.prepared import ImageData, load_images
from consistency.nets.checkpoint import load_denoiser, save_denoiser
from consistency.nets.denoiser import student_from_teacher
from consistency.provenance.card import Card
from consistency.stages.dataset import make_dataset

Prepare = Callable[..., ImageData]
Refusal = Callable[..., str]
CPU = torch.device("cpu")

#: students with coefficients of their own: of the data's moments, and of their average, refitted before steps 2 and 4
OWN = {
    "varies": ["coupling", "mu", "preconditioning", "fit", "dsm_weight"],
    "students.data": {"preconditioning": "analytic", "fit": "data"},
    "students.own": {"preconditioning": "analytic", "fit": "average", "dsm_weight": 1.0, "coupling": "gc"},
    "coefficients.samples": 64,
}


@pytest.fixture
def results(first_results: StudyPaths, tmp_path: Path) -> StudyPaths:
    """Dataset, teacher and coefficients."""
    shutil.copytree(first_results.results, tmp_path / "results")
    return StudyPaths("tiny", tmp_path / "results", tmp_path / "state")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An empty image folder <tmp>/images/train."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def prepare(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """prepare(channels=3, ...): run the stage dataset on that image folder and load what it wrote; few images do."""
    monkeypatch.setattr("consistency.stages.dataset.require_enough", lambda study, images: None)

    def run(workers: int = 1, **settings: Any) -> ImageData:
        path = str(tmp_path / "images")
        study = tiny({"dataset": {"kind": "image_folder", "path": path, "resolution": 8, "channels": 3, **settings}})
        layout = StudyPaths(study.name, tmp_path / "results", tmp_path / "state")
        make_dataset(Job(study, layout), workers)
        return load_images(layout.dataset)

    return run


@pytest.fixture
def refusal(prepare: Prepare, tmp_path: Path) -> Refusal:
    """refusal(channels=3, ...): the message of a preparation that must fail, and leaves no half-written array."""

    def fail(**settings: Any) -> str:
        message = mistake(prepare, **settings)
        assert not list((tmp_path / "results").rglob("*images.npy*"))
        return message

    return fail


@pytest.fixture(scope="session")
def job(tiny: Tiny, untaught: Changes, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished study without a teacher, and with flows."""
    # One image fewer than a whole number of batches.
    flows = {"images": 47, "times": 5, "toy_steps": 12, "toy_seeds": [0, 1], "pairs": 512, "intervals": 40}
    flows |= {"discrepancy": ["ic", "ot", "gc", "own"], "denoiser_steps": 40, "denoiser_batch": 64}
    study, folder = tiny(untaught | OWN | {"flows": flows}), tmp_path_factory.mktemp("untaught")
    job = Job(study, StudyPaths(study.name, folder / "results", folder / "state"))
    make_all(job)
    return job


def save_students(job: Job, steps: tuple[int | None, ...] = (None,)) -> None:
    """A student at every rate and step, None the end of training, each with weights of its own."""
    teacher = load_denoiser(job.paths.teacher_weights)[0]
    for k, path in enumerate(job.weights(rate, step) for rate in job.settings.rates for step in steps):
        student, generator = student_from_teacher(teacher), seeded(k)
        with torch.no_grad():
            for weight in student.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
        save_denoiser(path, student, {"key": job.key("student"), "study": "tiny"})
    Card(job, "student").write([job.weights()] if job.weights().exists() else [])
