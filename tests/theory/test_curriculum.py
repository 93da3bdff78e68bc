"""The levels of consistency training against their published schedules."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm
from tests.draws import numpy_draws, seeded

from consistency.theory.curriculum import (
    DoublingCurriculum,
    Levels,
    ShrinkingCurriculum,
    doubling_nodes,
    level_probabilities,
    shrink,
)
from consistency.theory.noise import rho_grid

EPS, T = 0.002, 80.0


@pytest.mark.parametrize(("steps", "stage"), [(400_000, 50_000), (100_000, 12_500), (150_000, 18_750)])
def test_the_grid_doubles_at_the_published_steps(steps: int, stage: int) -> None:
    nodes = [11, 21, 41, 81, 161, 321, 641, 1281]
    for k, expected in enumerate(nodes):
        assert doubling_nodes(k * stage, steps) == expected
        assert doubling_nodes((k + 1) * stage - 1, steps) == expected
    assert doubling_nodes(10 * steps, steps) == 1281


@pytest.mark.parametrize(
    ("first", "last", "steps"), [(10, 1280, 5), (10, 100, 10_000), (3, 4, 10), (7, 7, 9), (1, 9, 1)]
)
def test_any_curriculum_starts_at_first_never_falls_and_never_passes_last(first: int, last: int, steps: int) -> None:
    nodes = [doubling_nodes(step, steps, first, last) for step in range(2 * steps)]
    assert nodes[0] == first + 1
    assert nodes == sorted(nodes)
    assert nodes[-1] <= last + 1


def test_the_last_stage_is_capped() -> None:
    """10 to 100 is no whole number of doublings: K' = 10,000 / (log2 10 + 1) = 2,313 steps, the last stage capped."""
    assert doubling_nodes(4 * 2_313 - 1, 10_000, 10, 100) == 81
    assert doubling_nodes(4 * 2_313, 10_000, 10, 100) == 101


def test_level_probabilities_are_the_normal_mass_between_neighbours() -> None:
    grid = rho_grid(41, EPS, T)
    mass = -torch.diff(torch.from_numpy(norm.cdf(grid.log().numpy(), -1.1, 2.0)))
    torch.testing.assert_close(level_probabilities(grid), mass / mass.sum(), rtol=1e-12, atol=0)


@pytest.mark.statistical
def test_drawn_levels_are_neighbours_with_these_probabilities_and_weights() -> None:
    grid = rho_grid(21, EPS, T)
    t, u, weight = DoublingCurriculum(steps=800).levels(100, 100_000, seeded())
    upper = (grid[:, None] - t[None]).abs().argmin(0)
    assert torch.equal(grid[upper], t)
    assert torch.equal(grid[upper + 1], u)
    torch.testing.assert_close(weight, 1 / (t - u), rtol=0, atol=0)
    # 159 pairs of the rarest kind are expected.
    assert chisquare(torch.bincount(upper, minlength=20), 100_000 * level_probabilities(grid)).pvalue > 1e-6


def test_ect_shrinks_by_the_published_formula() -> None:
    for stage, t in [(0, 3.0), (2, 0.7), (5, 0.01), (7, 50.0)]:
        ratio = 1 - 2.0 ** -(stage + 1) * (1 + 8 / (1 + math.exp(t)))
        found = shrink(torch.tensor([t], dtype=torch.float64), stage).item()
        assert found == pytest.approx(max(0.0, ratio), rel=1e-12)


def test_ect_goes_from_denoising_to_neighbouring_times() -> None:
    """At stage 0 most targets are the data; the relative gap halves with each stage once it is below one."""
    t = torch.logspace(-2, 1.5, 50, dtype=torch.float64)
    assert bool((shrink(t, 0)[t < 1] == 0).all())
    for stage in range(4, 9):
        torch.testing.assert_close(1 - shrink(t, stage + 1), (1 - shrink(t, stage)) / 2, rtol=1e-9, atol=0)


@pytest.mark.statistical
@pytest.mark.parametrize("step", [0, 1000, 9000])
def test_ect_s_levels_are_lognormal_and_weighed_by_their_ratio(step: int) -> None:
    t, u, weight = ShrinkingCurriculum(double_every=1000).levels(step, 50_000, seeded())
    for quantile in (0.1, 0.3, 0.5, 0.9):
        level = math.exp(norm.ppf(quantile, -1.1, 2.0))
        assert (t < level).double().mean().item() == pytest.approx(quantile, abs=0.0125)
    r = t * shrink(t, step // 1000)
    torch.testing.assert_close(weight, 1 / (t - r))
    assert torch.equal(u, r.clamp(min=EPS))


@pytest.mark.parametrize("schedule", [DoublingCurriculum(steps=10), ShrinkingCurriculum(double_every=10)])
def test_levels_depend_on_step_and_generator_alone(schedule: DoublingCurriculum | ShrinkingCurriculum) -> None:
    one, same = (schedule.levels(7, 9, seeded(3)) for _ in range(2))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert all(value.dtype == torch.float64 for value in one)


# --- laws, with any settings


def some_times(draws: np.random.Generator) -> dict[str, float]:
    """eps, T and the normal law of ln sigma."""
    eps = float(10 ** draws.uniform(-4, -1))
    ends = {"sigma_min": eps, "sigma_max": float(eps * 10 ** draws.uniform(0.5, 5))}
    return ends | {"mean": float(draws.uniform(-3, 1)), "std": float(draws.uniform(0.5, 3))}


@pytest.mark.parametrize("seed", range(30))
def test_doubling_levels_are_ordered_within_the_times_and_weighed(seed: int) -> None:
    draws = numpy_draws(seed)
    times, steps, first = some_times(draws), int(draws.integers(1, 5000)), int(draws.integers(1, 40))
    last, rho = first + int(draws.integers(0, 2000)), float(draws.uniform(1, 9))
    curriculum = DoublingCurriculum(steps, rho=rho, first=first, last=last, **times)
    eps, end = times["sigma_min"], times["sigma_max"]
    for step in (0, steps // 2, steps - 1, 3 * steps):
        t, u, weight = curriculum.levels(step, 500, seeded(seed))
        assert bool(((eps * (1 - 1e-9) <= u) & (u < t) & (t <= end * (1 + 1e-9))).all())
        assert bool((torch.isfinite(weight) & (weight > 0)).all())
        torch.testing.assert_close(weight * (t - u), torch.ones(500, dtype=torch.float64))
        assert len(torch.cat([t, u]).unique()) <= doubling_nodes(step, steps, first, last) <= last + 1


@pytest.mark.parametrize("seed", range(30))
def test_shrinking_levels_are_ordered_within_the_times_and_weighed(seed: int) -> None:
    draws = numpy_draws(seed)
    times, every = some_times(draws), int(draws.integers(1, 500))
    shape = {"q": float(draws.uniform(1.1, 4)), "k": float(draws.uniform(0, 10)), "b": float(draws.uniform(0.1, 3))}
    curriculum = ShrinkingCurriculum(every, **times, **shape)
    eps, end, before = times["sigma_min"], times["sigma_max"], None
    for stage in range(12):
        t, u, weight = curriculum.levels(stage * every + every // 2, 500, seeded(seed))
        assert bool(((eps <= u) & (u <= t) & (t <= end)).all())
        assert bool((u < t)[t > eps].all())
        assert bool((torch.isfinite(weight) & (weight > 0)).all())
        # The same t at every stage, and a second level that only rises towards it.
        assert before is None or (torch.equal(before.t, t) and bool((before.u <= u).all()))
        before = Levels(t, u, weight)


@pytest.mark.parametrize(("q", "stages"), [(2.0, 48), (4.0, 24), (256.0, 6), (1.5, 82)])
def test_as_far_as_a_study_may_go_numbers_tell_the_levels_apart(q: float, stages: int) -> None:
    """A study may use 48 bits (config/rules.py); float64 has 53."""
    t, u, weight = ShrinkingCurriculum(1, q=q).levels(stages - 1, 10_000, seeded())
    assert bool((u < t)[t > EPS].all())
    assert bool(torch.isfinite(weight).all())


@pytest.mark.parametrize("mean", [math.log(EPS) - 5 * 0.5, math.log(T) + 5 * 0.5])
def test_as_far_as_a_study_may_go_there_are_levels_to_draw(mean: float) -> None:
    t, u, _ = DoublingCurriculum(10, mean=mean, std=0.5).levels(0, 100, seeded())
    assert bool((u < t).all())
