"""A study without a teacher, from the dataset to the report: real stages, in seconds. Its flows: test_flows.py."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.conftest import Changes, Tiny

from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.config.paths import StudyPaths
from consistency.data.prepared import load_images
from consistency.evaluation.estimate import estimate, training_operations
from consistency.evaluation.trained import open_student
from consistency.nets.checkpoint import load_denoiser
from consistency.provenance.verification import verify
from consistency.report.publish import publish
from consistency.report.verification import verify_published
from consistency.runtime.machine import Machine
from consistency.stages.coefficients import make_coefficients
from consistency.stages.flows import make_flows
from consistency.training.own_fit import covariance_fit

CPU = torch.device("cpu")


def test_in_the_teachers_place_is_a_network_that_nobody_takes_for_one(job: Job) -> None:
    network, _ = load_denoiser(job.paths.teacher_weights, key_of(job.study, "teacher"))
    assert not any(weight.any() for weight in network.parameters())
    student, _ = load_denoiser(job.of("gc", 0).weights())
    assert student.architecture == network.architecture | {"dropout": 0.0}
    assert student.label_dim == 10
    assert len(np.load(job.samples / "heun.npy")) == 0


def test_students_are_measured_against_the_data_alone(job: Job) -> None:
    calibration = pd.read_csv(job.scores)
    assert list(calibration.run) == ["data"]
    assert len(np.load(job.scores.with_name("endpoints.npy"))) == 0
    for run in job.study.students:
        scores = pd.read_csv(job.of(run, 0).scores)
        assert np.isfinite(scores[["fd", "kid"]]).all(axis=None)
        assert scores.alignment.isna().all()
        assert set(scores.sampler) == {"multistep"}
        assert set(scores[scores.kind == "curve"].step) == {0, 3, 6}


def test_the_arms_are_scored_the_same_before_training_alone(job: Job) -> None:
    runs = ["ic", "ot", "gc"]
    tables = [pd.read_csv(job.of(run, 0).scores).set_index(["kind", "step", "nfe"]).fd for run in runs]
    for table in tables[1:]:
        for nfe in job.study.scores.curve_nfe:
            assert table["curve", 0, nfe] == tables[0]["curve", 0, nfe]
            assert table["curve", 6, nfe] != tables[0]["curve", 6, nfe]


@pytest.mark.parametrize("run", ["ic", "gc", "data", "own"])
def test_a_students_file_alone_samples_the_same(job: Job, run: str) -> None:
    """Those that jump to eps alone, and those with coefficients of their own."""
    student = open_student(job.of(run, 0).weights(), CPU, "float32", 512)
    for nfe in job.study.sampling.nfe:
        assert np.array_equal(student.sample(80, nfe), np.load(job.of(run, 0).samples / f"nfe{nfe}.npy"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(student(x, 0.002, 0.002), x)
    with pytest.raises(UserError, match=r"this student jumps only to s = 0\.002"):
        student(x, 2.0, 1.0)


def test_what_was_made_agrees_with_its_cards(job: Job) -> None:
    assert [finding for finding in verify(job.paths.root, job.study) if finding.faults] == []
    assert not list(job.paths.state.rglob("state.pt"))


def test_students_carry_the_coefficients_they_were_trained_with(job: Job) -> None:
    fits = {
        (run, step): load_denoiser(job.of(run, 0).weights(step=step))[0].fit
        for run in ("data", "own")
        for step in (0, 3, 6, None)
    }
    first = covariance_fit(load_images(job.paths.dataset), fits["data", 0][0])
    for run, step in (("data", 0), ("data", 3), ("data", None), ("own", 0)):
        assert torch.equal(fits[run, step], first)
    assert torch.equal(fits["own", 6], fits["own", None])
    assert len({tuple(fits["own", step][1].tolist()) for step in (0, 3, 6)}) == 3
    assert not job.paths.coefficients.exists()


def test_the_estimate_counts_the_evaluations_that_training_did(job: Job) -> None:
    found = estimate(job).operations
    assert found["teacher"] == found["coefficients"] == 0 < found["flows"]
    counted = {
        run: json.loads((job.of(run, 0).folder / "card.json").read_text())["measured"]["network_evaluations"]
        for run in job.study.students
    }
    step = 6 * 16
    refits = 2 * 2 * job.study.coefficients.times * 64
    assert counted == {"ic": 4 * step, "ot": 4 * step, "gc": 5 * step, "data": 4 * step, "own": 8 * step + refits}
    assert counted == {run: training_operations(job.study, job.study.students[run], 1.0) for run in job.study.students}


def test_the_report_has_no_teacher_in_its_pictures(job: Job) -> None:
    names = {path.stem for path in (job.paths.report / "figures").glob("*.png")}
    scored = {"samples", "own_fits", "curves_fd", "curves_kid", "losses", "speedup_fd"}
    assert names == scored | {"transport_cost", "discrepancy", "toy", "plane", "loss_limits"}
    page = (job.paths.report / "report.html").read_text()
    assert '<h2 id="flows">' in page
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S):
        assert "seed" in caption


def test_what_the_study_does_not_ask_for_is_not_made(tiny: Tiny, couplings: Changes, tmp_path: Path) -> None:
    job = Job(tiny(couplings), StudyPaths("tiny", tmp_path / "results", tmp_path / "state"))
    with pytest.raises(UserError, match="study tiny has no section flows"):
        make_flows(job, Machine(CPU))
    with pytest.raises(UserError, match="no student of tiny reads coefficients"):
        make_coefficients(job, CPU)


def test_its_page_has_the_tables_of_flows_and_own_fits(job: Job, tmp_path: Path) -> None:
    publish(job, tmp_path / "pages", tmp_path / "archives")
    folder = tmp_path / "pages/tiny"
    for name in ("transport.csv", "discrepancy.csv", "plane.csv", "limit.csv"):
        assert (folder / name).read_bytes() == (job.paths.flows / name).read_bytes()
    fits = pd.read_csv(folder / "own_fits.csv")
    assert list(fits) == ["run", "step", "times", "l", "s"]
    assert set(fits.run) == set(job.study.with_own_fit)
    assert not (folder / "coefficients.csv").exists()
    assert [finding for finding in verify_published(folder, job.study) if finding.faults] == []
