"""The tiny study's first results in folders of one's own, and students that were never trained."""

import shutil
from pathlib import Path

import pytest
import torch

from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.nets.checkpoint import load_denoiser, save_denoiser
from consistency.nets.denoiser import student_from_teacher
from consistency.provenance.card import Card

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


def save_students(job: Job, steps: tuple[int | None, ...] = (None,)) -> None:
    """A student at every rate and step, None the end of training, each with weights of its own."""
    teacher = load_denoiser(job.paths.teacher_weights)[0]
    for k, path in enumerate(job.weights(rate, step) for rate in job.settings.rates for step in steps):
        student, generator = student_from_teacher(teacher), torch.Generator().manual_seed(k)
        with torch.no_grad():
            for weight in student.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
        save_denoiser(path, student, {"key": job.key("student"), "study": "tiny"})
    Card(job, "student").write([job.weights()] if job.weights().exists() else [])
