"""A study without a teacher, from the dataset to the report: real stages, in seconds."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.conftest import Tiny
from tests.stages.conftest import OWN

from consistency.base.errors import UserError
from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.data.prepared import load_images
from consistency.evaluation.estimate import estimate, training_operations
from consistency.nets.checkpoint import load_denoiser
from consistency.provenance.verification import verify
from consistency.runtime.machine import Machine
from consistency.stages.coefficients import make_coefficients
from consistency.stages.dataset import make_dataset
from consistency.stages.extractor import make_extractor
from consistency.stages.flows import make_flows
from consistency.stages.report import make_report
from consistency.stages.samples import make_samples
from consistency.stages.scores import make_calibration, make_scores
from consistency.stages.student import make_student
from consistency.stages.teacher import make_teacher
from consistency.training.discrepancy import ImagePairs, discrepancy_of
from consistency.training.fits import time_grid
from consistency.training.own_fit import covariance_fit
from consistency.training.toy import train_toy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(tiny: Tiny, untaught: dict[str, Any]) -> Study:
    # One image fewer than a whole number of batches.
    flows = {"images": 47, "times": 5, "toy_steps": 12, "toy_seeds": [0, 1], "pairs": 512, "intervals": 40}
    flows |= {"discrepancy": ["ic", "ot", "gc", "own"], "denoiser_steps": 40, "denoiser_batch": 64}
    return tiny(untaught | OWN | {"flows": flows})


@pytest.fixture(scope="module")
def layout(study: Study, tmp_path_factory: pytest.TempPathFactory) -> StudyPaths:
    """The finished study."""
    folder = tmp_path_factory.mktemp("untaught")
    job, machine = Job(study, StudyPaths(study.name, folder / "results", folder / "state")), Machine(CPU)
    make_dataset(job)
    make_teacher(job, machine)
    make_extractor(job, CPU)
    make_samples(job, CPU)
    make_calibration(job, CPU)
    for student in job.trainings:
        make_student(student, machine)
        make_samples(student, CPU)
        make_scores(student, CPU)
    make_flows(job, machine)
    make_report(job)
    return job.paths


def test_in_the_teachers_place_is_a_network_that_nobody_takes_for_one(study: Study, layout: StudyPaths) -> None:
    network, _ = load_denoiser(layout.teacher_weights, key_of(study, "teacher"))
    assert not any(weight.any() for weight in network.parameters())
    student, _ = load_denoiser(Job(study, layout, "gc", 0).weights())
    assert student.architecture == network.architecture | {"dropout": 0.0}
    assert student.label_dim == 10
    assert len(np.load(Job(study, layout).samples / "heun.npy")) == 0


def test_students_are_measured_against_the_data_alone(study: Study, layout: StudyPaths) -> None:
    calibration = pd.read_csv(Job(study, layout).scores)
    assert list(calibration.run) == ["data"]
    assert len(np.load(Job(study, layout).scores.with_name("endpoints.npy"))) == 0
    for run in study.students:
        scores = pd.read_csv(Job(study, layout, run, 0).scores)
        assert np.isfinite(scores[["fd", "kid"]]).all(axis=None)
        assert scores.alignment.isna().all()
        assert set(scores.sampler) == {"multistep"}
        assert set(scores[scores.kind == "curve"].step) == {0, 3, 6}


def test_the_arms_are_scored_the_same_before_training_alone(study: Study, layout: StudyPaths) -> None:
    runs = ["ic", "ot", "gc"]
    tables = [pd.read_csv(Job(study, layout, run, 0).scores).set_index(["kind", "step", "nfe"]).fd for run in runs]
    for table in tables[1:]:
        for nfe in study.scores.curve_nfe:
            assert table["curve", 0, nfe] == tables[0]["curve", 0, nfe]
            assert table["curve", 6, nfe] != tables[0]["curve", 6, nfe]


def test_what_was_made_agrees_with_its_cards(study: Study, layout: StudyPaths) -> None:
    assert [finding for finding in verify(layout.root, study) if finding.faults] == []
    assert not list(layout.state.rglob("state.pt"))


def test_students_carry_the_coefficients_they_were_trained_with(study: Study, layout: StudyPaths) -> None:
    fits = {
        (run, step): load_denoiser(Job(study, layout, run, 0).weights(step=step))[0].fit
        for run in ("data", "own")
        for step in (0, 3, 6, None)
    }
    first = covariance_fit(load_images(layout.dataset), fits["data", 0][0])
    for run, step in (("data", 0), ("data", 3), ("data", None), ("own", 0)):
        assert torch.equal(fits[run, step], first)
    assert torch.equal(fits["own", 6], fits["own", None])
    assert len({tuple(fits["own", step][1].tolist()) for step in (0, 3, 6)}) == 3
    assert not layout.coefficients.exists()


def test_the_estimate_counts_the_evaluations_that_training_did(study: Study, layout: StudyPaths) -> None:
    found = estimate(Job(study, layout)).operations
    assert found["teacher"] == found["coefficients"] == 0 < found["flows"]
    counted = {
        run: json.loads((Job(study, layout, run, 0).folder / "card.json").read_text())["measured"][
            "network_evaluations"
        ]
        for run in study.students
    }
    step = 6 * 16
    refits = 2 * 2 * study.coefficients.times * 64
    assert counted == {"ic": 4 * step, "ot": 4 * step, "gc": 5 * step, "data": 4 * step, "own": 8 * step + refits}
    assert counted == {run: training_operations(study, study.students[run], 1.0) for run in study.students}


def test_the_report_has_no_teacher_in_its_pictures(study: Study, layout: StudyPaths) -> None:
    names = {path.stem for path in (layout.report / "figures").glob("*.png")}
    scored = {"samples", "own_fits", "curves_fd", "curves_kid", "losses", "speedup_fd"}
    assert names == scored | {"transport_cost", "discrepancy", "toy", "plane", "loss_limits"}
    page = (layout.report / "report.html").read_text()
    assert '<h2 id="flows">' in page
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S):
        assert "seed" in caption


# --- the stage flows


def transport(layout: StudyPaths) -> pd.DataFrame:
    return pd.read_csv(layout.flows / "transport.csv")


def test_at_eps_every_student_leaves_x_where_it_is(study: Study, layout: StudyPaths) -> None:
    """The boundary condition: f(x_eps, eps) = x + eps z, so the cost is known, whatever the weights."""
    table, eps = transport(layout), study.noise.sigma_min
    data = load_images(layout.dataset)
    draws = generator(0, "flows")
    images, _ = data.take(torch.randperm(len(data), generator=draws)[:47])
    noise = torch.randn(images.shape, generator=draws)
    exact = (images + (eps - 1) * noise).double().square().flatten(1).sum(1)
    first = table[(table.kind == "student") & (table.t == table.t.min())]
    assert table.t.min() == pytest.approx(eps)
    np.testing.assert_allclose(first.cost, exact.mean().item(), rtol=1e-5)
    np.testing.assert_allclose(first.cost_se, exact.std().item() / 47**0.5, rtol=1e-5)


def test_every_student_has_a_cost_of_its_own_at_every_time(study: Study, layout: StudyPaths) -> None:
    table = transport(layout)
    rows = table[table.kind == "student"]
    grid = time_grid(study, 5, CPU).tolist()
    assert set(rows.run) == set(study.students) and set(rows.seed) == {0}
    for _, times in rows.groupby("run").t:
        np.testing.assert_allclose(times.sort_values(ascending=False), grid, rtol=1e-12)
    assert rows[rows.t == rows.t.max()].cost.nunique() == len(study.students)


def test_the_pairs_of_ot_are_cheaper_than_those_of_ic(layout: StudyPaths) -> None:
    pairs = transport(layout)[lambda table: table.kind == "pairs"].set_index("run").cost
    assert list(pairs.index) == ["ic", "ot"]
    assert pairs["ot"] < pairs["ic"]


def test_ot_stays_within_its_batches_and_classes() -> None:
    draws = torch.Generator().manual_seed(0)
    images, noise = torch.randn(11, 1, 2, 2, generator=draws), torch.randn(11, 1, 2, 2, generator=draws)
    labels = torch.arange(11) % 2
    moved = ImagePairs(images, labels, noise, 64).transported(4).noise
    assert len(moved) == 8
    for first in (0, 4):
        for label in (0, 1):
            rows = [k for k in range(first, first + 4) if labels[k] == label]
            assert {tuple(row) for row in moved[rows].flatten(1).tolist()} == {
                tuple(row) for row in noise[rows].flatten(1).tolist()
            }
    assert len(ImagePairs(images, None, noise, 64).transported(64).noise) == 11


def test_the_discrepancy_is_a_number_for_each_coupling_that_is_named(study: Study, layout: StudyPaths) -> None:
    table = pd.read_csv(layout.flows / "discrepancy.csv")
    assert list(dict.fromkeys(table.run)) == ["ic", "ot", "gc", "own"]
    assert len(table) == 20 and set(table.seed) == {0}
    assert (table.discrepancy > 0).all() and (table.discrepancy_se > 0).all()
    last = table[table.t == table.t.max()].set_index("run").discrepancy
    # At T the data hide under the noise: R_t is about the data's variance over t^2, for any denoiser near its mean.
    assert (last < 64 * 4 / 80**2).all()


def test_the_denoisers_of_couplings_differ_in_the_coupling_alone(study: Study, layout: StudyPaths) -> None:
    data, machine = load_images(layout.dataset), Machine(CPU)
    assert study.flows is not None
    runs = ("ic", "ot", "gc")
    found = {run: discrepancy_of(Job(study, layout, run, 0), study.flows, data, machine) for run in runs}
    first = [next(measure.training.update.model.parameters()) for measure in found.values()]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    kinds = {run: type(measure.objective).__name__ for run, measure in found.items()}
    assert kinds == {"ic": "CoupledDenoising", "ot": "TransportDenoising", "gc": "CoupledDenoising"}
    assert found["ic"].objective.coupling.mu == 0 and found["gc"].objective.coupling.mu == 0.5
    own = next(load_denoiser(Job(study, layout, "gc", 0).weights())[0].parameters())
    predictor = found["gc"].objective.coupling.predictor
    assert predictor is not None and torch.equal(next(predictor.parameters()), own)


def test_the_toys_are_those_of_their_seeds(layout: StudyPaths) -> None:
    with np.load(layout.flows / "toy.npz") as arrays:
        toy = train_toy("gc", 1, steps=12)
        np.testing.assert_array_equal(arrays["gc_paths"][1], toy.paths)
        np.testing.assert_array_equal(arrays["gc_cost"][1], toy.cost)
        np.testing.assert_array_equal(arrays["times"], toy.times)
        assert arrays["ic_samples"].shape == (2, 64, 2)


def test_on_the_toys_data_the_discrepancy_of_ic_is_the_closed_one(layout: StudyPaths) -> None:
    """Where t is large against the modes' distance, the data are one Gaussian: R_t = sum c / (c + t^2)."""
    table = pd.read_csv(layout.flows / "plane.csv")
    assert list(dict.fromkeys(table.coupling)) == ["ic", "ot", "gc"]
    last = table[table.t == table.t.max()].set_index("coupling")
    t, c = last.t["ic"], np.array([1e-4, 0.25 + 1e-4])
    assert t == 5.0
    assert last.discrepancy["ic"] == pytest.approx((c / (c + t**2)).sum(), rel=0.1)
    exact = 0.25 + 2 * 1e-4 + 2  # E||x||^2 + E||z||^2
    assert last.cost["ic"] == pytest.approx(exact, abs=0.2)  # 4 deviations of a mean of 2,048 pairs
    assert last.cost["gc"] < 0.8 * exact and last.cost["ot"] < 0.8 * exact
    assert table[table.coupling == "ic"].cost.nunique() == 1


def test_the_losses_near_their_limits(layout: StudyPaths) -> None:
    table = pd.read_csv(layout.flows / "limit.csv")
    assert list(table.intervals) == [10, 20, 40]
    ratio = table.intervals**2 * table.ct / table.ct_limit
    assert (np.diff(ratio) > 0).all() and 0.98 < ratio.iloc[-1] < 1


def test_what_the_study_does_not_ask_for_is_not_made(tiny: Tiny, couplings: dict[str, Any], tmp_path: Path) -> None:
    job = Job(tiny(couplings), StudyPaths("tiny", tmp_path / "results", tmp_path / "state"))
    with pytest.raises(UserError, match="study tiny has no section flows"):
        make_flows(job, Machine(CPU))
    with pytest.raises(UserError, match="no student of tiny reads coefficients"):
        make_coefficients(job, CPU)
