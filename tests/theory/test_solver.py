"""The solver's order, the grids' ends and the samplers, on ODEs with closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from tests.draws import seeded

from consistency.theory.noise import ctm_dsm_sigma, edm_weight, log_grid, rho_grid
from consistency.theory.oracles import GaussianTeacher
from consistency.theory.preconditioning import ctm
from consistency.theory.sampler import Churn, Fresh, multistep, stochastic_heun
from consistency.theory.solver import expand, heun_solve, heun_step

TEACHER = GaussianTeacher(torch.tensor([0.04, 0.25, 1.0], dtype=torch.float64))


def start(count: int = 5) -> torch.Tensor:
    return 10 * torch.randn(count, 3, dtype=torch.float64, generator=seeded())


@pytest.mark.statistical
def test_heun_is_of_order_two() -> None:
    x = start()
    exact = TEACHER.flow(x, 10.0, 0.1)
    grids = [log_grid(nodes, 0.1, 10.0).tolist() for nodes in (41, 81, 161)]
    errors = [(heun_solve(TEACHER, x, times) - exact).abs().max().item() for times in grids]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert bool((abs(orders - 2) < 0.15).all()), orders


def test_each_image_may_have_its_own_times() -> None:
    x, t, u = start(4), torch.tensor([10.0, 5.0, 1.0, 0.5]), torch.tensor([5.0, 1.0, 0.9, 0.1])
    together = heun_step(TEACHER, x, t.double(), u.double())
    for i in range(4):
        alone = heun_step(TEACHER, x[i : i + 1], t[i : i + 1].double(), u[i : i + 1].double())
        torch.testing.assert_close(together[i], alone[0])


def test_rho_grid_is_the_published_one() -> None:
    """The times of NFE 2, 3 and 5 that CTM's code jumps through."""
    for nodes, inside in ((3, [2.5152]), (4, [9.7232, 0.4700]), (6, [24.4083, 5.8389, 0.9654, 0.0851])):
        grid = rho_grid(nodes, 0.002, 80.0)
        assert (grid[0].item(), grid[-1].item()) == (80.0, 0.002)
        np.testing.assert_allclose(grid[1:-1], inside, atol=6e-5)


@pytest.mark.parametrize("grid", [rho_grid, log_grid])
def test_grids_descend_between_exact_ends_and_refuse_nonsense(grid) -> None:  # type: ignore[no-untyped-def]
    times = grid(40, 0.002, 80.0)
    assert bool((times[:-1] > times[1:]).all())
    assert (times[0].item(), times[-1].item()) == (80.0, 0.002)
    with pytest.raises(ValueError, match="at least 2"):
        grid(1, 0.002, 80.0)


def test_gamma_zero_is_plain_jumps_and_needs_no_noise() -> None:
    times = rho_grid(4, 0.002, 80.0)

    def jump(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        f, g = ctm(t, s)
        return expand(f, x) * x + expand(g, x) * TEACHER(x, t)

    x = expected = 8 * start()
    for t, s in itertools.pairwise(times):
        ones = torch.ones(len(x), dtype=torch.float64)
        expected = jump(expected, t * ones, s * ones)
    torch.testing.assert_close(multistep(jump, x, times.tolist()), expected)


@pytest.mark.statistical
@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_gamma_sampling_restores_the_noise_level(gamma: float) -> None:
    """With the exact flow as the jump, the marginal at every time is the data's plus that noise."""
    generator = seeded()
    count = 200_000
    data = torch.sqrt(TEACHER.variances) * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    x = data + 5 * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    times = rho_grid(4, 0.002, 5.0).tolist()

    def jump(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return TEACHER.flow(x, t[0].item(), s[0].item())

    def fresh() -> torch.Tensor:
        return torch.randn(count, 3, dtype=torch.float64, generator=generator)

    end = multistep(jump, x, times, gamma, fresh)
    torch.testing.assert_close(end.var(0), TEACHER.variances, rtol=0.02, atol=0)


# --- EDM's stochastic sampler


def noise_of(seed: int, count: int) -> Fresh:
    generator = seeded(seed)
    return lambda: torch.randn(count, 3, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("churn", "t", "raised"),
    [
        (Churn(40, 0.05, 50, 1.003), 1.0, 1 + 40 / 256),
        (Churn(40, 0.05, 50, 1.003), 0.05, 0.05 * (1 + 40 / 256)),
        (Churn(40, 0.05, 50, 1.003), 50.1, 50.1),
        (Churn(40, 0.05, 50, 1.003), 0.049, 0.049),
        (Churn(1e6, 0, 1e9, 1), 2.0, 2 * math.sqrt(2)),
    ],
)
def test_churn_raises_the_time_inside_its_range_by_at_most_root_two(churn: Churn, t: float, raised: float) -> None:
    assert churn.raised(t, 256) == pytest.approx(raised, rel=1e-15)


@pytest.mark.parametrize("churn", [Churn(0, 0, 1e9, 1), Churn(40, 200, 300, 1)])
def test_without_added_noise_it_is_the_ode_solver(churn: Churn) -> None:
    def never() -> torch.Tensor:
        raise AssertionError("noise was asked for")

    x, times = start(), [*rho_grid(9, 0.002, 80.0).tolist(), 0.0]
    assert torch.equal(stochastic_heun(TEACHER, x, times, churn, never), heun_solve(TEACHER, x, times))


def test_two_steps_of_it_written_out() -> None:
    """Karras et al. 2022, algorithm 2; the second time lies outside the range of added noise."""
    x, fresh = start(), noise_of(1, 5)
    found = stochastic_heun(TEACHER, x, [10.0, 1.0, 0.0], Churn(0.5, 5, 50, 1.1), noise_of(1, 5))
    ones = torch.ones(len(x), dtype=torch.float64)
    hat = 10 * (1 + 0.25)
    x = x + math.sqrt(hat**2 - 10**2) * 1.1 * fresh()
    slope = (x - TEACHER(x, hat * ones)) / hat
    ahead = x + (1 - hat) * slope
    x = x + (1 - hat) * (slope + (ahead - TEACHER(ahead, ones)) / 1) / 2
    torch.testing.assert_close(found, TEACHER(x, ones))


@pytest.mark.statistical
@pytest.mark.parametrize(("deviation", "right"), [(1.0, True), (1.3, False)])
def test_churn_keeps_the_marginals(deviation: float, right: bool) -> None:
    """An exact teacher adds and removes noise in equal amounts, over many steps. With too much of it the data
    is too wide."""
    count = 50_000
    x = torch.sqrt(TEACHER.variances + 20**2) * noise_of(0, count)()
    churn = Churn(20, 0.05, 50, deviation)
    end = stochastic_heun(TEACHER, x, [*rho_grid(200, 0.002, 20.0).tolist(), 0.0], churn, noise_of(1, count))
    off = (end.var(0) / TEACHER.variances - 1).abs().max()
    assert (off < 0.035) == right


def test_each_step_costs_two_evaluations_and_the_last_one() -> None:
    times = []

    def counted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t[0].item())
        return TEACHER(x, t)

    stochastic_heun(counted, start(), [*rho_grid(8, 0.002, 80.0).tolist(), 0.0], Churn(40, 0, 100, 1), noise_of(0, 5))
    assert len(times) == 2 * 8 - 1
    assert min(times) > 0


@pytest.mark.statistical
def test_edm_s_weight_and_ctm_s_levels_are_the_published_ones() -> None:
    torch.testing.assert_close(edm_weight(torch.tensor([0.5]), 0.5), torch.tensor([8.0]))
    sigma = ctm_dsm_sigma(4001, 0.002, 80.0, seeded())
    assert len(sigma) == 4001
    large = sigma[2000:]
    # U(0, 0.7) of the rho grid ends at 0.3183 (CTM's code).
    assert large.min() > 0.318
    assert large.max() <= 80
    assert abs(sigma[:2000].log().mean() + 1.2) < 0.15  # 5 standard errors
