"""R_t by the teacher, and what a study with one writes beside the couplings."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.conftest import Tiny
from tests.nets.small import make_denoiser

from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.provenance.card import read_card
from consistency.report import figures
from consistency.runtime.machine import Machine
from consistency.stages.flows import make_flows
from consistency.stages.student import make_student
from consistency.training.discrepancy import ImagePairs, by_teacher

CPU = Machine(torch.device("cpu"))


def test_a_study_with_a_teacher_sets_it_beside_its_couplings(
    tiny: Tiny, couplings: dict[str, Any], results: StudyPaths
) -> None:
    settings = {"images": 20, "times": 3, "toy_steps": 2, "pairs": 64, "intervals": 10, "discrepancy": ["full", "ic"]}
    students = {"ic": {}, "full": {"coupling": "gc", "predictor": {"run": "ic"}}}
    study = tiny(
        couplings
        | {"students": students, "varies": ["coupling", "predictor"]}
        | {"flows": settings | {"denoiser_steps": 4, "denoiser_batch": 8}}
    )
    for run in students:
        make_student(Job(study, results, run, 0), CPU)
    make_flows(Job(study, results), CPU)
    table = pd.read_csv(results.flows / "discrepancy.csv")
    assert list(table.run) == ["teacher"] * 3 + ["full"] * 3 + ["ic"] * 3
    assert list(table.seed.fillna(-1)) == [-1] * 3 + [0] * 6
    card = read_card(Job(study, results), "flows")
    assert {"teacher/teacher.safetensors", "students/ic/seed0/student.safetensors"} <= card["inputs"].keys()
    figure = figures.discrepancy(table, list(students))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["full", "ic", "independent noise, by the teacher"]
    figures.close(figure)
    # Trained once: the state of the denoisers goes when the numbers are written.
    assert not list(results.state.rglob("state.pt"))


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_teachers_discrepancy_is_its_denoising_error(batch: int, labelled: bool) -> None:
    """A network that is zero: D = c_skip x_t, and R_t is ||x - c_skip (x + t z)||^2 / t^2."""
    teacher = make_denoiser(0, label_dim=10 if labelled else 0)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.zero_()
    images, noise = torch.randn(7, 1, 4, 4), torch.randn(7, 1, 4, 4)
    labels = torch.arange(7) if labelled else None
    for t in (0.002, 0.7, 80.0):
        kept = 0.25 / (0.25 + t**2)
        expected = ((images - kept * (images + t * noise)) / t).square().flatten(1).sum(1)
        found: Any = by_teacher(teacher, ImagePairs(images, labels, noise, batch), t)
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3)
