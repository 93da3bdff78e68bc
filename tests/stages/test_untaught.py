"""A study without a teacher, from the dataset to the report: real stages, in seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from consistency.archive import verify
from consistency.layout import Layout
from consistency.stages.dataset import make_dataset
from consistency.stages.estimate import estimate
from consistency.stages.extractor import make_extractor
from consistency.stages.report import make_report
from consistency.stages.samples import make_samples
from consistency.stages.scores import make_calibration, make_scores
from consistency.stages.student import make_student
from consistency.stages.teacher import make_teacher
from consistency.stages.trainer import Machine
from consistency.study import Study
from consistency.training.checkpoint import load_denoiser

Tiny = Callable[..., Study]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(tiny: Tiny, untaught: dict[str, Any]) -> Study:
    return tiny(untaught)


@pytest.fixture(scope="module")
def layout(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The finished study."""
    folder = tmp_path_factory.mktemp("untaught")
    made, machine = Layout(study.name, folder / "results", folder / "state"), Machine(CPU)
    make_dataset(study, made)
    make_teacher(study, made, machine)
    make_extractor(study, made, CPU)
    make_samples(study, made, None, None, CPU)
    make_calibration(study, made, CPU)
    for run in study.students:
        make_student(study, made, run, 0, machine)
        make_samples(study, made, run, 0, CPU)
        make_scores(study, made, run, 0, CPU)
    make_report(study, made)
    return made


def test_in_the_teachers_place_is_a_network_that_nobody_takes_for_one(study: Study, layout: Layout) -> None:
    network, _ = load_denoiser(layout.teacher / "teacher.safetensors", study.key("teacher"))
    assert not any(weight.any() for weight in network.parameters())
    student, _ = load_denoiser(layout.student_file("gc", 0))
    assert student.architecture == network.architecture | {"dropout": 0.0}
    assert student.label_dim == 10
    assert len(np.load(layout.samples(None, None) / "heun.npy")) == 0


def test_students_are_measured_against_the_data_alone(study: Study, layout: Layout) -> None:
    calibration = pd.read_csv(layout.scores(None, None))
    assert list(calibration.run) == ["data"]
    assert len(np.load(layout.scores(None, None).with_name("endpoints.npy"))) == 0
    for run in study.students:
        scores = pd.read_csv(layout.scores(run, 0))
        assert np.isfinite(scores[["fd", "kid"]]).all(axis=None)
        assert scores.alignment.isna().all()
        assert set(scores.sampler) == {"multistep"}
        assert set(scores[scores.kind == "curve"].step) == {0, 3, 6}


def test_the_arms_are_scored_the_same_before_training_alone(study: Study, layout: Layout) -> None:
    tables = [pd.read_csv(layout.scores(run, 0)).set_index(["kind", "step", "nfe"]).fd for run in study.students]
    for table in tables[1:]:
        for nfe in study.scores.curve_nfe:
            assert table["curve", 0, nfe] == tables[0]["curve", 0, nfe]
            assert table["curve", 6, nfe] != tables[0]["curve", 6, nfe]


def test_what_was_made_agrees_with_its_cards(study: Study, layout: Layout) -> None:
    assert {finding.artifact: finding.state for finding in verify(layout.root, study) if finding.faults} == {}


def test_the_estimate_counts_the_evaluations_that_training_did(study: Study, layout: Layout) -> None:
    costs = {cost.stage: cost.operations for cost in estimate(study, layout)}
    assert costs["teacher"] == costs["coefficients"] == 0
    counted = {
        run: json.loads((layout.student(run, 0) / "card.json").read_text())["measured"]["network_evaluations"]
        for run in study.students
    }
    assert counted == {"ic": 6 * 16 * 4, "ot": 6 * 16 * 4, "gc": 6 * 16 * 5}


def test_the_report_has_no_teacher_in_its_pictures(study: Study, layout: Layout) -> None:
    names = {path.stem for path in (layout.report / "figures").glob("*.png")}
    assert names == {"samples", "curves_fd", "losses", "speedup_fd"}


def test_every_folder_was_handed_over(layout: Layout) -> None:
    assert not list(Path(layout.state).rglob("state.pt"))
