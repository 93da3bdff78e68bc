"""The solver's order, the grids' ends and the samplers, on ODEs with closed forms."""

import itertools

import numpy as np
import pytest
import torch

from consistency.theory.noise import ctm_dsm_sigma, edm_weight, log_grid, rho_grid
from consistency.theory.oracles import GaussianTeacher
from consistency.theory.preconditioning import ctm
from consistency.theory.sampler import multistep
from consistency.theory.solver import expand, heun_solve, heun_step

TEACHER = GaussianTeacher(torch.tensor([0.04, 0.25, 1.0], dtype=torch.float64))


def start(count: int = 5) -> torch.Tensor:
    return 10 * torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_heun_is_of_order_two() -> None:
    x = start()
    exact = TEACHER.flow(x, 10.0, 0.1)
    errors = [
        (heun_solve(TEACHER, x, list(log_grid(nodes, 0.1, 10.0))) - exact).abs().max().item() for nodes in (41, 81, 161)
    ]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert bool((abs(orders - 2) < 0.15).all()), orders


def test_each_image_may_have_its_own_times() -> None:
    x, t, u = start(4), torch.tensor([10.0, 5.0, 1.0, 0.5]), torch.tensor([5.0, 1.0, 0.9, 0.1])
    together = heun_step(TEACHER, x, t.double(), u.double())
    for i in range(4):
        alone = heun_step(TEACHER, x[i : i + 1], t[i : i + 1].double(), u[i : i + 1].double())
        torch.testing.assert_close(together[i], alone[0])


def test_a_last_time_of_zero_is_the_denoiser_itself() -> None:
    x = start()
    times = torch.tensor([10.0, 1.0, 0.0], dtype=torch.float64)
    t = torch.ones(len(x), dtype=torch.float64)
    middle = heun_step(TEACHER, x, 10 * t, t)
    torch.testing.assert_close(heun_solve(TEACHER, x, list(times)), TEACHER(middle, t))


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
    torch.testing.assert_close(multistep(jump, x, times), expected)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_gamma_sampling_restores_the_noise_level(gamma: float) -> None:
    """With the exact flow as the jump, the marginal at every time is the data's plus that noise."""
    generator = torch.Generator().manual_seed(0)
    count = 200_000
    data = torch.sqrt(TEACHER.variances) * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    x = data + 5 * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    times = rho_grid(4, 0.002, 5.0)

    def jump(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return TEACHER.flow(x, t[0].item(), s[0].item())

    def fresh() -> torch.Tensor:
        return torch.randn(count, 3, dtype=torch.float64, generator=generator)

    end = multistep(jump, x, times, gamma, fresh)
    torch.testing.assert_close(end.var(0), TEACHER.variances, rtol=0.02, atol=0)


def test_edm_weight_and_ctm_s_levels() -> None:
    torch.testing.assert_close(edm_weight(torch.tensor([0.5]), 0.5), torch.tensor([8.0]))
    sigma = ctm_dsm_sigma(4001, 0.002, 80.0, torch.Generator().manual_seed(0))
    assert len(sigma) == 4001
    large = sigma[2000:]
    # U(0, 0.7) of the rho grid ends at 0.3183 (REFERENCE B4).
    assert large.min() > 0.318
    assert large.max() <= 80
    assert abs(sigma[:2000].log().mean() + 1.2) < 0.1
