"""Speed-ups and intervals on curves whose answers are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tests.draws import numpy_draws

from consistency.evaluation.analysis import (
    Curves,
    bootstrap,
    curves_of,
    ema_table,
    final_table,
    iterations_to,
    mean_interval,
    of_main_rate,
    paired_ratio,
    paired_ratios,
    speed_up,
    speed_ups,
    step_costs,
)

STEPS = np.arange(0, 1100, 100)


def falling(pace: float, seeds: int = 3, noise: float = 0.0) -> Curves:
    """exp(-pace step / 500), with noise of its own a seed."""
    draws = numpy_draws(int(100 * pace)).normal(0, noise, (seeds, len(STEPS)))
    return Curves(STEPS, np.exp(-pace * STEPS / 500) + draws, list(range(seeds)))


def table(curves: dict[str, Curves]) -> pd.DataFrame:
    """Scores of FD, a row a student, seed and step."""
    wide = {run: pd.DataFrame(curve.values, curve.seeds, curve.steps) for run, curve in curves.items()}
    rows = pd.concat(wide, names=["run", "seed"]).rename_axis(columns="step").stack().rename("fd").reset_index()
    return rows.assign(kind="curve", nfe=2, sampler="jumps", alignment=np.nan)


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


def test_the_target_is_the_last_point_not_the_luckiest() -> None:
    """On the way there, the best so far counts on both sides."""
    dip = Curves(np.array([0, 100, 200, 300, 400]), np.array([[8.0, 4.0, 1.0, 3.0, 2.0]]), [0])
    value, bound, target, own, _ = speed_up(dip, dip)
    assert (value, bound, target) == (1.0, "", 2.0)
    assert own == pytest.approx(100 + 100 * 2 / 3)


@pytest.mark.statistical
def test_equal_students_miss_the_target_no_more_often_than_not() -> None:
    """With noise of which every point has its own, as in the curves of two equal students."""
    draws, missed = numpy_draws(), 0
    for _ in range(1000):
        noisy = [falling(1).values.mean(0) + 0.5 + draws.normal(0, 0.05, (2, len(STEPS))) for _ in range(2)]
        missed += speed_up(*(Curves(STEPS, values, [0, 1]) for values in noisy))[1] == "<"
    assert missed < 500  # 5 standard errors above the 430 of many draws


def test_a_baseline_that_does_not_improve_gives_no_speed_up() -> None:
    worse = Curves(STEPS, np.linspace(1, 2, len(STEPS))[None].repeat(2, 0), [0, 1])
    value, bound, *_ = speed_up(worse, falling(1, seeds=2))
    assert np.isnan(value)
    assert bound == "?"
    assert bootstrap(worse, falling(1, seeds=2), 20) == (0.0, np.inf)


def test_iterations_are_linear_between_snapshots() -> None:
    reached = iterations_to(np.array([0, 100, 200]), np.array([3.0, 2.0, 1.0]), 1.25)
    assert (reached.steps, reached.bound) == (175.0, "")


@pytest.mark.statistical
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


def test_an_interval_is_open_where_resamples_are_bounds() -> None:
    """One seed of the student never reaches the target, the other has it before training."""
    baseline = falling(1, seeds=2)
    never = np.stack([falling(0.2).values[0], np.full(len(STEPS), 1e-3)])
    assert bootstrap(baseline, Curves(STEPS, never, [0, 1]), 200) == (0.0, np.inf)
    slow = falling(0.5, seeds=2)
    assert bootstrap(baseline, slow, 50) == (0.0, 1.0)


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


def test_the_paired_ratio_is_free_of_the_noise_both_share() -> None:
    """Two arms 3 % apart under noise of 30 % that a seed has in both: the interval is exact."""
    noise = np.exp(numpy_draws().normal(0, 0.3, (4, len(STEPS))))
    baseline = Curves(STEPS, noise, [0, 1, 2, 3])
    student = Curves(STEPS, 0.97 * noise[::-1], [3, 2, 1, 0])
    ratio, low, high, seeds = paired_ratio(baseline, student)
    assert (ratio, low, high) == pytest.approx((0.97, 0.97, 0.97))
    assert seeds == 4


def test_the_paired_interval_is_the_t_interval_of_the_logs() -> None:
    baseline = Curves(STEPS, np.ones((3, len(STEPS))), [0, 1, 2])
    student = Curves(STEPS, np.repeat([[0.9], [1.0], [1.2]], len(STEPS), 1), [0, 1, 2])
    ratio, low, high, _ = paired_ratio(baseline, student)
    mean, half = mean_interval(np.log([0.9, 1.0, 1.2]))
    assert (ratio, low, high) == pytest.approx((np.exp(mean), np.exp(mean - half), np.exp(mean + half)))
    assert low < 1 < high


def test_only_the_second_half_counts() -> None:
    baseline = falling(1)
    student = Curves(STEPS, baseline.values * np.where(STEPS > 500, 0.5, 7), baseline.seeds)
    assert paired_ratio(baseline, student)[0] == pytest.approx(0.5)
    found = paired_ratios(table({"cm": baseline, "other": student}), {"cm": "cm", "other": "cm"}, [2])
    assert [(item.run, item.measure) for item in found] == [("other", "fd")]


def several_rates() -> pd.DataFrame:
    """Two students of three rates, the main one 0.9 and 0.99, and the calibration."""
    rows = [
        {"kind": "final", "run": run, "seed": seed, "ema": rate, "sampler": sampler, "nfe": nfe, "fd": fd, "images": 7}
        for run in ("b", "a")
        for seed in (0, 1)
        for rate, fd in ((0.9, 1.0 + seed), (0.99, 2.0 + seed), (0.5, 3.0 + seed))
        for sampler, nfe in (("jumps", 2), ("jumps", 10), ("gamma=1.0", 2))
    ]
    rows.append({"kind": "calibration", "run": "teacher", "sampler": "heun", "nfe": 35, "fd": 0.5, "images": 7})
    return pd.DataFrame(rows).assign(kid=0.5, alignment=np.nan)


def test_the_main_rate_is_each_students_own_and_the_calibration_has_none() -> None:
    main = of_main_rate(several_rates(), {"a": 0.9, "b": 0.99})
    assert set(zip(main.run, main.ema.fillna(0), strict=True)) == {("a", 0.9), ("b", 0.99), ("teacher", 0)}
    assert len(main) == 2 * 2 * 3 + 1
    final = final_table(main)
    rows = [(run, *sampler) for run in ("b", "a") for sampler in (("jumps", 2), ("jumps", 10), ("gamma=1.0", 2))]
    assert list(zip(final.run, final.sampler, final.nfe, strict=True)) == rows
    assert final.fd.tolist() == [2.5] * 3 + [1.5] * 3
    assert final.fd_half_width.to_numpy() == pytest.approx(mean_interval(np.array([0, 1]))[1])
    assert final.alignment.isna().all()


def test_the_ema_table_has_a_row_a_student_jumps_and_rate() -> None:
    found = ema_table(several_rates())
    rates = [0.5, 0.9, 0.99]
    assert list(zip(found.run, found.nfe, found.ema, strict=True)) == [
        (run, nfe, rate) for run in ("b", "a") for nfe in (2, 10) for rate in rates
    ]
    assert found.fd.tolist() == [3.5, 1.5, 2.5] * 4
    assert set(found.seeds) == {2}


def test_step_costs_are_means_over_trainings_and_the_largest_memory() -> None:
    timed = [pd.DataFrame({"step": [1, 2], "time_data": [0.1, 0.3], "peak_memory_mib": [10, top]}) for top in (5, 20)]
    found = step_costs({"a": timed, "b": [pd.DataFrame({"step": [1], "loss": [1.0]})]})
    assert found.to_dict("records") == [{"run": "a", "data": pytest.approx(0.2), "peak_memory_mib": 20}]
    assert step_costs({"b": [pd.DataFrame({"step": [1]})]}).empty
