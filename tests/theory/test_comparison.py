"""Speed-ups and intervals on curves whose answers are known."""

import numpy as np
import pytest
from scipy import stats
from tests.draws import numpy_draws

from consistency.theory.comparison import Estimate, holm, mean_interval, mean_ratio, speed_up

STEPS = np.arange(100, 1100, 100)
SHAPES = {
    "power law": lambda t: t**-0.8,
    "flat end": lambda t: 0.1 + np.exp(-6 * t),
    "falls and rises": lambda t: 1.1 * np.exp(-5 * t) + 0.8 + 0.4 * t**1.5,
    "late fall": lambda t: 0.05 + 1 / (1 + (3 * t) ** 2),
}


def compared(shape: str, factor: float, common: np.ndarray, own: np.ndarray, steps: np.ndarray = STEPS) -> Estimate:
    """A student that runs through a curve so many times faster; noise common to both [seeds, P], own [2, seeds, P]."""
    first, second = (np.log(SHAPES[shape](pace * steps / steps[-1])) for pace in (1, factor))
    return speed_up((steps, steps), first + common + own[0], second + common + own[1])


def drawn(seeds: int, common: float, own: float, stream: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = numpy_draws(stream)
    return draws.normal(0, common, (seeds, len(STEPS))), draws.normal(0, own, (2, seeds, len(STEPS)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [0.5, 0.8, 1, 1.3, 2])
def test_a_curve_that_is_run_through_faster_gives_its_factor(shape: str, factor: float) -> None:
    found = compared(shape, factor, np.zeros((3, 1)), np.zeros((2, 3, 1)))
    assert found.value == pytest.approx(factor, rel=0.02)


def test_equal_curves_have_exactly_one_whatever_their_noise() -> None:
    common, _ = drawn(4, 0.05, 0)
    found = compared("power law", 1, common, np.zeros((2, 4, 1)))
    assert (found.value, found.p) == pytest.approx((1, 1))
    assert (found.low, found.high) == pytest.approx((1, 1), rel=0.005)


def test_the_unit_of_the_score_and_of_the_steps_do_not_matter_and_the_order_inverts() -> None:
    common, own = drawn(4, 0.05, 0.02)
    first, second = (
        np.log(SHAPES["late fall"](pace * STEPS / 1000)) + common + each
        for pace, each in zip((1, 1.4), own, strict=True)
    )
    there = speed_up((STEPS, STEPS), first, second)
    scaled = speed_up((STEPS / 7, STEPS / 7), first + 3, second + 3)
    assert vars(scaled) == pytest.approx(vars(there))
    back = speed_up((STEPS, STEPS), second, first)
    assert (1 / back.value, 1 / back.high, 1 / back.low, back.p) == pytest.approx(tuple(vars(there).values()))
    costly = speed_up((STEPS, 3 * STEPS), first, second)
    assert (3 * costly.value, 3 * costly.low) == pytest.approx((there.value, there.low))


def test_the_test_of_no_difference_is_a_paired_t_test() -> None:
    common, own = drawn(5, 0.01, 0.005)
    found = compared("power law", 1, common, own)
    assert (found.low > 1 or found.high < 1) == (found.p < 0.05)
    assert compared("power law", 1, 2 * common, own).p == pytest.approx(found.p)  # common noise cancels


def test_two_seeds_have_a_range_and_one_has_none() -> None:
    common, own = drawn(2, 0.05, 0.02)
    found = compared("power law", 1.3, common, own)
    each = [compared("power law", 1.3, common[k : k + 1], own[:, k : k + 1]) for k in range(2)]
    assert (found.low, found.high) == pytest.approx(tuple(sorted(one.value for one in each)))
    assert np.isnan([found.p, *(number for one in each for number in (one.low, one.high, one.p))]).all()


def test_an_interval_is_open_where_the_curves_do_not_tell() -> None:
    """A curve that does not fall has no speed."""
    draws = numpy_draws()
    noise = draws.normal(0, 0.05, (2, 5, len(STEPS)))
    found = speed_up((STEPS, STEPS), *noise)
    assert found.low == 0 or found.high == np.inf
    far = speed_up((STEPS, STEPS), 5 + noise[0] - STEPS / 1000, noise[1] - STEPS / 1000)
    assert (far.value, far.high) == (np.inf, np.inf) and far.low > 3
    assert speed_up((STEPS, STEPS), noise[0] - STEPS / 1000, 5 + noise[1] - STEPS / 1000).value == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_snapshots_say_nothing(count: int) -> None:
    steps = np.array([800, 900, 1000])[-count:]
    assert np.isnan(list(vars(compared("power law", 1, np.zeros((3, 1)), np.zeros((2, 3, 1)), steps)).values())).all()


@pytest.mark.statistical
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [1, 2])
def test_intervals_hold_the_truth_as_often_as_they_say(shape: str, factor: float) -> None:
    """Of 100 studies with three seeds 95 do, with a standard deviation of 2.2; benchmarks/coverage.py takes more."""
    found = [compared(shape, factor, *drawn(3, 0.05, 0.02, stream)) for stream in range(100)]
    assert sum(each.low <= factor <= each.high for each in found) >= 86
    assert np.median([each.value for each in found]) == pytest.approx(factor, rel=0.05)


def test_the_t_interval_is_scipy_s() -> None:
    values = np.array([1.0, 2.0, 4.0])
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert np.isnan(mean_interval(np.array([3.0]))[1])
    found = mean_ratio(values)
    assert tuple(vars(found).values()) == pytest.approx(
        (*np.exp([mean, low, high]), stats.ttest_1samp(values, 0).pvalue)
    )


def test_a_mean_ratio_of_few_seeds_is_a_range_or_a_value() -> None:
    two, one = mean_ratio(np.log([1.0, 4.0])), mean_ratio(np.log([3.0]))
    assert (two.value, two.low, two.high) == pytest.approx((2, 1, 4))
    assert one.value == pytest.approx(3) and np.isnan([two.p, one.low, one.high, one.p]).all()
    assert mean_ratio(np.zeros(3)).p == 1 and mean_ratio(np.ones(3)).p == 0


def test_holm_multiplies_the_smallest_most() -> None:
    found = holm([0.04, np.nan, 0.01, 0.03, 0.5])
    np.testing.assert_allclose(found, [0.09, np.nan, 0.04, 0.09, 0.5])
    assert holm([0.5, 0.9]).tolist() == [1, 1] and len(holm([])) == 0
