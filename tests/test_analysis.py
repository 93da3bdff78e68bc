"""Speed-ups and intervals on curves whose answers are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from consistency.analysis import (
    Curves,
    bootstrap,
    curves_of,
    final_table,
    iterations_to,
    mean_interval,
    speed_up,
    speed_ups,
)

STEPS = np.arange(0, 1100, 100)


def falling(pace: float, seeds: int = 3, noise: float = 0.0) -> Curves:
    """exp(-pace step / 500), with noise of its own a seed."""
    draws = np.random.default_rng(int(100 * pace)).normal(0, noise, (seeds, len(STEPS)))
    return Curves(STEPS, np.exp(-pace * STEPS / 500) + draws, list(range(seeds)))


def table(curves: dict[str, Curves], measure: str = "fd") -> pd.DataFrame:
    rows = [
        {"kind": "curve", "run": run, "seed": seed, "step": step, "nfe": 2, "sampler": "jumps", measure: value}
        for run, curve in curves.items()
        for seed, line in zip(curve.seeds, curve.values, strict=True)
        for step, value in zip(curve.steps, line, strict=True)
    ]
    return pd.DataFrame(rows).reindex(columns=["kind", "run", "seed", "step", "nfe", "sampler", "fd", "alignment"])


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_baseline_against_itself_is_exactly_one(noise: float) -> None:
    value, bound, _, own, other = speed_up(falling(1, noise=noise), falling(1, noise=noise))
    assert (value, bound) == (1.0, "")
    assert own == other


@pytest.mark.parametrize("pace", [1.25, 2.0, 4.0])
def test_a_faster_curve_gives_its_pace(pace: float) -> None:
    value, bound, *_ = speed_up(falling(1), falling(pace))
    assert bound == ""
    assert value == pytest.approx(pace, rel=0.1)  # linear between snapshots, on a curve that is not


def test_a_score_never_reached_is_a_bound_below_one() -> None:
    value, bound, *_ = speed_up(falling(1), falling(0.5))
    assert (value, bound) == (1.0, "<")


def test_a_score_there_before_training_is_a_bound_above() -> None:
    better = Curves(STEPS, np.full((3, len(STEPS)), 0.01), [0, 1, 2])
    value, bound, *_, steps = speed_up(falling(1), better)
    assert (value, bound, steps) == (10.0, ">", 100.0)


def test_the_curve_may_rise_again() -> None:
    """The best so far counts, on both sides."""
    rising = Curves(STEPS, np.concatenate([falling(1).values[:, :6], falling(1).values[:, 4::-1]], 1), [0, 1, 2])
    value, _, target, own, _ = speed_up(rising, rising)
    assert value == 1
    assert own == 500
    assert target == pytest.approx(np.exp(-1))


def test_iterations_are_linear_between_snapshots() -> None:
    reached = iterations_to(np.array([0, 100, 200]), np.array([3.0, 2.0, 1.0]), 1.25)
    assert (reached.steps, reached.bound) == (175.0, "")


def test_the_bootstrap_is_deterministic_and_holds_the_truth() -> None:
    baseline, student = falling(1, seeds=6, noise=0.01), falling(2, seeds=6, noise=0.01)
    first, second = bootstrap(baseline, student, 300), bootstrap(baseline, student, 300)
    assert first == second
    assert first[0] <= speed_up(baseline, student)[0] <= first[1]
    assert first[1] - first[0] > 0


def test_equal_arms_have_an_interval_of_exactly_one() -> None:
    """Paired by seed: the noise of a seed is in both arms."""
    arm = falling(1, seeds=4, noise=0.1)
    assert bootstrap(arm, arm, 200) == (1.0, 1.0)


def test_one_seed_has_no_interval() -> None:
    assert all(np.isnan(bootstrap(falling(1, seeds=1), falling(2, seeds=1), 50)))
    mean, half = mean_interval(np.array([3.0]))
    assert mean == 3
    assert np.isnan(half)


def test_the_t_interval_is_scipy_s() -> None:
    values = np.array([1.0, 2.0, 4.0])
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_a_measure_that_was_not_taken_gives_no_row() -> None:
    scores = table({"cm": falling(1), "other": falling(2)})
    assert curves_of(scores, "cm", 2, "alignment") is None
    found = speed_ups(scores, {"cm": "cm", "other": "cm"}, [2], 20)
    assert [(item.run, item.measure, item.nfe) for item in found] == [("other", "fd", 2)]


def test_the_final_table_has_a_row_a_student_and_sampler() -> None:
    rows = [
        {"kind": "final", "run": run, "seed": seed, "step": 9, "sampler": sampler, "nfe": 2, "fd": seed, "images": 7}
        for run in ("a", "b")
        for sampler in ("jumps", "gamma=1.0")
        for seed in (0, 1, 2)
    ]
    scores = pd.DataFrame(rows).assign(kid=0.5, alignment=np.nan)
    found = final_table(scores)
    assert len(found) == 4
    assert found.fd.tolist() == [1.0] * 4
    assert found.fd_half_width.to_numpy() == pytest.approx(mean_interval(np.array([0, 1, 2]))[1])
    assert found.alignment.isna().all()
