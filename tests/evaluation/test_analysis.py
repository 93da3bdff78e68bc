"""Speed-ups and intervals on curves whose answers are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tests.draws import numpy_draws

from consistency.evaluation.analysis import (
    Curves,
    Pair,
    Paired,
    SpeedUp,
    curves_of,
    ema_table,
    final_table,
    iterations_to,
    of_main_rate,
    paired_ratio,
    paired_ratios,
    speed_ups,
    step_costs,
    to_final_score,
)
from consistency.report import wording
from consistency.theory.comparison import mean_interval

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


def pair(run: str = "other", **costs: tuple[float, float]) -> list[Pair]:
    return [Pair(run, "cm", costs or {"iterations": (1.0, 1.0)})]


def test_the_final_score_counts_on_the_best_so_far_and_may_never_be_reached() -> None:
    dip = Curves(np.array([0, 100, 200, 300, 400]), np.array([[8.0, 4.0, 1.0, 3.0, 2.0]]), [0])
    found = to_final_score(dip, dip)
    assert (found["target"], found["reached"]) == (2.0, "")
    assert found["steps"] == found["baseline_steps"] == pytest.approx(100 + 100 * 2 / 3)
    assert to_final_score(falling(1), falling(0.5))["reached"] == "<"
    better = Curves(STEPS, np.full((3, len(STEPS)), 0.01), [0, 1, 2])
    assert to_final_score(falling(1), better)["reached"] == ">"
    rising = Curves(STEPS, 1 / falling(1).values, [0, 1, 2])
    assert to_final_score(rising, falling(1))["reached"] == "?"


def test_iterations_are_linear_between_snapshots() -> None:
    reached = iterations_to(np.array([0, 100, 200]), np.array([3.0, 2.0, 1.0]), 1.25)
    assert (reached.steps, reached.bound) == (175.0, "")


def test_a_student_of_another_objective_is_compared_by_what_its_iterations_cost() -> None:
    """Twice as fast by iterations that cost four times as many evaluations and as much time."""
    scores = table({"cm": falling(1), "other": falling(2)})
    evaluations, seconds = speed_ups(scores, pair(evaluations=(10, 40), seconds=(0.5, 0.5)), [2])
    assert (evaluations.unit, seconds.unit) == ("evaluations", "seconds")
    assert evaluations.value == pytest.approx(0.5, rel=0.01)
    assert seconds.value == pytest.approx(2, rel=0.01)
    assert evaluations.steps == pytest.approx(4 * 10 * 500, rel=0.01)
    cheap, _ = paired_ratios(scores, pair(evaluations=(10, 40), seconds=(0.5, 0.5)), [2])
    # At the same cost the student has made a quarter of the iterations: exp(-t / 2) against exp(-t).
    late = 4 * STEPS[(STEPS > 125) & (STEPS <= 250)]
    assert cheap.value == pytest.approx(np.exp((late / 1000).mean()), rel=0.02)


def test_only_seeds_of_both_are_compared() -> None:
    baseline = falling(1, seeds=4, noise=0.01)
    few = Curves(STEPS, baseline.values[[3, 1, 2]], [3, 1, 2])
    (item,) = speed_ups(table({"cm": baseline, "other": few}), pair(), [2])
    assert (item.seeds, item.value, item.equal, item.shown) == (3, 1, True, False)


def test_a_distance_that_rounding_makes_negative_is_no_error() -> None:
    perfect = Curves(STEPS, np.full((3, len(STEPS)), -1e-15), [0, 1, 2])
    (item,) = speed_ups(table({"cm": falling(1), "other": perfect}), pair(), [2])
    assert item.value == np.inf


def test_many_comparisons_make_a_claim_harder() -> None:
    curves = {"cm": falling(1, 4, 0.02), "other": falling(1.6, 4, 0.02), "one": falling(1.1, 4, 0.02)}
    (alone,) = speed_ups(table(curves), pair(), [2])
    first, second = speed_ups(table(curves), pair() + pair("one"), [2])
    assert first.p == 2 * alone.p and first.p < second.p
    assert first.low == alone.low


@pytest.mark.parametrize(
    ("low", "high", "p", "shown", "equal"),
    [
        (1.2, 1.9, 0.01, True, False),
        (1.2, 1.9, 0.06, False, False),  # others were looked at as well
        (0.9, 1.9, 0.01, False, False),
        (1.001, 1.008, 0.001, False, True),  # no more than rounding
        (0.2, 0.9, 0.01, True, False),
        (np.nan, np.nan, np.nan, False, False),
    ],
)
def test_a_difference_is_shown_beyond_chance_and_rounding(
    low: float, high: float, p: float, shown: bool, equal: bool
) -> None:
    place = {"run": "a", "baseline": "b", "measure": "fd", "nfe": 1, "unit": "iterations", "seeds": 5}
    final = {"target": 1.0, "baseline_steps": 1.0, "steps": 1.0, "reached": ""}
    item = SpeedUp(**place, **final, value=1.5, low=low, high=high, p=p)  # type: ignore[arg-type]
    assert (item.shown, item.equal) == (shown, equal)


def test_a_measure_that_was_not_taken_gives_no_row() -> None:
    scores = table({"cm": falling(1), "other": falling(2)})
    assert curves_of(scores, "cm", 2, "alignment") is None
    found = speed_ups(scores, pair(), [2])
    assert [(item.run, item.measure, item.nfe) for item in found] == [("other", "fd", 2)]


def test_the_paired_ratio_is_free_of_the_noise_both_share() -> None:
    """Two arms 3 % apart under noise of 30 % that a seed has in both: the interval is exact."""
    noise = np.exp(numpy_draws().normal(0, 0.3, (4, len(STEPS))))
    baseline = Curves(STEPS, noise, [0, 1, 2, 3])
    student = Curves(STEPS, 0.97 * noise[::-1], [3, 2, 1, 0])
    (item,) = paired_ratios(table({"cm": baseline, "other": student}), pair(), [2])
    assert (item.value, item.low, item.high, item.seeds) == pytest.approx((0.97, 0.97, 0.97, 4))


def test_only_the_second_half_counts() -> None:
    baseline = falling(1)
    student = Curves(STEPS, baseline.values * np.where(STEPS > 500, 0.5, 7), baseline.seeds)
    assert paired_ratio(baseline, student).value == pytest.approx(0.5)


def test_a_baseline_that_ends_before_the_first_snapshot_determines_no_ratio() -> None:
    """By evaluations or seconds the one may end before the other begins."""
    student = falling(1)
    found = paired_ratio(replace(student, steps=student.steps / 1e4), student)
    assert np.isnan([found.value, found.low, found.high, found.p]).all()
    place = {"run": "a", "baseline": "b", "measure": "fd", "nfe": 1, "unit": "seconds", "seeds": 5}
    item = Paired(**place, **vars(found))  # type: ignore[arg-type]
    assert wording.ratio(item) == "not determined"
    assert "no snapshots in common" in wording.paired_sentence(item, "classifier")


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
