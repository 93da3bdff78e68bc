"""The flows stage: what it measures of students without a teacher, and beside them of one with a teacher."""

import numpy as np
import pandas as pd
import pytest
import torch
from tests.conftest import Changes, Tiny

from consistency.base.seeding import generator
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.data.prepared import load_images
from consistency.nets.checkpoint import load_denoiser
from consistency.provenance.card import read_card
from consistency.report import figures
from consistency.runtime.machine import Machine
from consistency.stages.flows import make_flows
from consistency.stages.student import make_student
from consistency.training.discrepancy import discrepancy_of
from consistency.training.fits import time_grid
from consistency.training.toy import train_toy

CPU = Machine(torch.device("cpu"))


def test_a_study_with_a_teacher_sets_it_beside_its_couplings(
    tiny: Tiny, couplings: Changes, results: StudyPaths
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


def transport(job: Job) -> pd.DataFrame:
    return pd.read_csv(job.paths.flows / "transport.csv")


def test_at_eps_every_student_leaves_x_where_it_is(job: Job) -> None:
    """The boundary condition: f(x_eps, eps) = x + eps z, so the cost is known, whatever the weights."""
    table, eps = transport(job), job.study.noise.sigma_min
    data = load_images(job.paths.dataset)
    draws = generator(0, "flows")
    images, _ = data.take(torch.randperm(len(data), generator=draws)[:47])
    noise = torch.randn(images.shape, generator=draws)
    exact = (images + (eps - 1) * noise).double().square().flatten(1).sum(1)
    first = table[(table.kind == "student") & (table.t == table.t.min())]
    assert table.t.min() == pytest.approx(eps)
    np.testing.assert_allclose(first.cost, exact.mean().item(), rtol=1e-5)
    np.testing.assert_allclose(first.cost_se, exact.std().item() / 47**0.5, rtol=1e-5)


def test_every_student_has_a_cost_of_its_own_at_every_time(job: Job) -> None:
    table = transport(job)
    rows = table[table.kind == "student"]
    grid = time_grid(job.study.noise, 5).tolist()
    assert set(rows.run) == set(job.study.students) and set(rows.seed) == {0}
    for _, times in rows.groupby("run").t:
        np.testing.assert_allclose(times.sort_values(ascending=False), grid, rtol=1e-12)
    assert rows[rows.t == rows.t.max()].cost.nunique() == len(job.study.students)


def test_the_pairs_of_ot_are_cheaper_than_those_of_ic(job: Job) -> None:
    pairs = transport(job)[lambda table: table.kind == "pairs"].set_index("run").cost
    assert list(pairs.index) == ["ic", "ot"]
    assert pairs["ot"] < pairs["ic"]


def test_the_discrepancy_is_a_number_for_each_coupling_that_is_named(job: Job) -> None:
    table = pd.read_csv(job.paths.flows / "discrepancy.csv")
    assert list(dict.fromkeys(table.run)) == ["ic", "ot", "gc", "own"]
    assert len(table) == 20 and set(table.seed) == {0}
    assert (table.discrepancy > 0).all() and (table.discrepancy_se > 0).all()
    last = table[table.t == table.t.max()].set_index("run").discrepancy
    # At T the data hide under the noise: R_t is about the data's variance over t^2, for any denoiser near its mean.
    assert (last < 64 * 4 / 80**2).all()


def test_the_denoisers_of_couplings_differ_in_the_coupling_alone(job: Job) -> None:
    """They begin as one network, and end with errors of their own."""
    data, settings = load_images(job.paths.dataset), job.study.flows
    assert settings is not None
    found = {run: discrepancy_of(job.of(run, 0), settings, data, CPU) for run in ("ic", "ot", "gc")}
    first = [next(measure.training.update.model.parameters()) for measure in found.values()]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    table = pd.read_csv(job.paths.flows / "discrepancy.csv")
    assert (table[table.run != "own"].groupby("t").discrepancy.nunique() == 3).all()
    assert found["ic"].objective.coupling.mu == 0 and found["gc"].objective.coupling.mu == 0.5
    own = next(load_denoiser(job.of("gc", 0).weights())[0].parameters())
    predictor = found["gc"].objective.coupling.predictor
    assert predictor is not None and torch.equal(next(predictor.parameters()), own)


def test_the_toys_are_those_of_their_seeds(job: Job) -> None:
    with np.load(job.paths.flows / "toy.npz") as arrays:
        toy = train_toy("gc", 1, steps=12)
        np.testing.assert_array_equal(arrays["gc_paths"][1], toy.paths)
        np.testing.assert_array_equal(arrays["gc_cost"][1], toy.cost)
        np.testing.assert_array_equal(arrays["times"], toy.times)
        assert arrays["ic_samples"].shape == (2, 64, 2)


def test_on_the_toys_data_the_discrepancy_of_ic_is_the_closed_one(job: Job) -> None:
    """Where t is large against the modes' distance, the data are one Gaussian: R_t = sum c / (c + t^2)."""
    table = pd.read_csv(job.paths.flows / "plane.csv")
    assert list(dict.fromkeys(table.coupling)) == ["ic", "ot", "gc"]
    last = table[table.t == table.t.max()].set_index("coupling")
    t, c = last.t["ic"], np.array([1e-4, 0.25 + 1e-4])
    assert t == 5.0
    assert last.discrepancy["ic"] == pytest.approx((c / (c + t**2)).sum(), rel=0.1)
    exact = 0.25 + 2 * 1e-4 + 2  # E||x||^2 + E||z||^2
    assert last.cost["ic"] == pytest.approx(exact, abs=0.2)  # 4 deviations of a mean of 2,048 pairs
    assert last.cost["gc"] < 0.8 * exact and last.cost["ot"] < 0.8 * exact
    assert table[table.coupling == "ic"].cost.nunique() == 1


def test_the_losses_near_their_limits(job: Job) -> None:
    table = pd.read_csv(job.paths.flows / "limit.csv")
    assert list(table.intervals) == [10, 20, 40]
    ratio = table.intervals**2 * table.ct / table.ct_limit
    assert (np.diff(ratio) > 0).all() and 0.98 < ratio.iloc[-1] < 1
