"""Laws of the consistency function's coefficients, and the known identities between them."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from tests.draws import seeded

from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import log_grid, rho_grid
from consistency.theory.oracles import GaussianTeacher
from consistency.theory.preconditioning import FORMS, bcm, build_preconditioning, ctm
from consistency.theory.solver import expand

EPS, T = 0.002, 80.0
TIMES = log_grid(120, EPS, T)


LAMBDA = -torch.log(TIMES)
# l and s like a real teacher's: l from 1 down to 0, s from 2 down to -2
L, S = torch.sigmoid(-LAMBDA), 2 * torch.tanh(-LAMBDA + 0.3 * torch.sin(3 * LAMBDA))


def wiggly_ode(scale: float = 1.0, centre: torch.Tensor | None = None) -> GeneralizedODE:
    return GeneralizedODE(TIMES, L, scale * S, centre=centre)


def pairs(nodes: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """All t >= s of a grid."""
    grid = log_grid(nodes, EPS, T)
    first, second = torch.triu_indices(nodes, nodes)
    return grid[first], grid[second]


@pytest.mark.parametrize("name", FORMS)
def test_boundary_condition_is_exact(name: str) -> None:
    preconditioning = build_preconditioning(name, 0.5, wiggly_ode(centre=torch.ones(1, 2, 2)))
    generator = seeded()
    random = EPS * (T / EPS) ** torch.rand(1001, generator=generator, dtype=torch.float64)
    t = torch.cat([random, log_grid(50, EPS, T), rho_grid(18, EPS, T)])
    f, g = preconditioning.coefficients(t, t)
    assert torch.equal(f, torch.ones_like(t))
    assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.5, 1.0])
def test_ctm_is_the_member_l_0_s_minus_1(theta: float) -> None:
    ode = GeneralizedODE(TIMES, torch.zeros(120), -torch.ones(120))
    t, s = pairs()
    torch.testing.assert_close(ode.step(t, s, theta), ctm(t, s), rtol=1e-8, atol=1e-9)


def test_ctm_and_bcm_are_the_same_function_of_x_and_F() -> None:
    t, s = pairs()
    x, network = torch.randn(2, len(t), 3, dtype=torch.float64, generator=seeded())
    for sigma_data in (0.3, 0.5, 0.75):
        variance = t**2 + sigma_data**2
        denoised = expand(sigma_data**2 / variance, x) * x + expand(sigma_data * t / variance.sqrt(), x) * network
        f, g = ctm(t, s)
        by_ctm = expand(f, x) * x + expand(g, x) * denoised
        f, g = bcm(t, s, sigma_data)
        torch.testing.assert_close(by_ctm, expand(f, x) * x + expand(g, x) * network, rtol=1e-12, atol=1e-12)


def test_cm_is_the_published_pair_at_s_eps() -> None:
    t = torch.tensor([EPS, 0.5, T], dtype=torch.float64)
    f, g = build_preconditioning("cm", 0.5).coefficients(t, torch.full_like(t, EPS))
    gap = t - EPS
    torch.testing.assert_close(f, 0.25 / (gap**2 + 0.25))
    torch.testing.assert_close(g, gap * 0.5 / (t**2 + 0.25).sqrt())


@pytest.mark.parametrize("form", ["backward", "forward", "midpoint"])
def test_coefficients_are_the_integrals_they_stand_for(form: str) -> None:
    """AP (11)-(14) are written out with a fine trapezoid rule and no logarithms."""
    ode = wiggly_ode()
    for t, s in ((80.0, 0.002), (2.5, 0.4), (0.05, 0.04)):
        lam = torch.linspace(-torch.tensor(t).log(), -torch.tensor(s).log(), 200_001, dtype=torch.float64)
        l, m = (torch.from_numpy(CubicSpline(LAMBDA, v)(lam)) for v in (L, S))
        log_l, log_s = (torch.cumulative_trapezoid(v, lam) for v in (l, m))
        big_l, big_s = (torch.cat([torch.ones(1), torch.exp(v)]) for v in (log_l, log_s))
        eta = torch.trapezoid(big_l * big_s, lam)
        if form == "backward":
            den = big_l[-1] * big_s[-1] + (1 - l[-1]) * eta
            expected = big_l[0] * big_s[-1] / den, eta / den
        elif form == "forward":
            den = big_l[-1] * big_s[0]
            expected = (big_l[0] * big_s[0] + (l[0] - 1) * eta) / den, eta / den
        else:
            mean = (big_s[0] + big_s[-1]) / 2
            den = big_l[-1] * mean + (1 - l[-1]) * eta / 2
            expected = (big_l[0] * mean + (l[0] - 1) * eta / 2) / den, eta / den
        times = torch.tensor([[t], [s]], dtype=torch.float64)
        found = ode.step(*times, theta=0.5) if form == "midpoint" else getattr(ode, form)(*times)
        torch.testing.assert_close([value[0] for value in found], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0, -30.0])
def test_nothing_overflows_for_any_jump(scale: float) -> None:
    t, s = pairs()
    for theta in (0.5, 1.0):
        f, g = wiggly_ode(scale).step(t, s, theta)
        assert bool(torch.isfinite(f).all() and torch.isfinite(g).all() and (g >= 0).all())
    assert bool((f >= 0).all())


@pytest.mark.parametrize(("theta", "order"), [(0.0, 1), (1.0, 1), (0.5, 2)])
def test_with_the_denoiser_known_at_both_ends_the_midpoint_is_of_second_order(theta: float, order: int) -> None:
    teacher = GaussianTeacher(torch.tensor([0.01, 0.3, 2.0], dtype=torch.float64))
    times = log_grid(400, 1.5, 2.1)
    ode = GeneralizedODE(times, *teacher.coefficients(times))
    x = torch.ones(1, 3, dtype=torch.float64)
    errors = []
    for ratio in (0.8, 0.9):
        t, s = torch.tensor([[2.0], [2.0 * ratio]], dtype=torch.float64)
        there = teacher.flow(x, 2.0, 2.0 * ratio)
        f, g = ode.step(t, s, theta)
        errors.append((f * x + g * (theta * teacher(there, s) + (1 - theta) * teacher(x, t)) - there).norm())
    # The error of a step is of one order more than the method.
    assert float(torch.log(errors[0] / errors[1])) / np.log(np.log(0.8) / np.log(0.9)) == pytest.approx(
        order + 1, abs=0.2
    )


class Shifted:
    """A student denoiser of data translated by a mean image."""

    def __init__(self, mean: torch.Tensor) -> None:
        self.mean = mean

    def __call__(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, labels: None = None) -> torch.Tensor:
        return self.mean + torch.tanh(x - self.mean) * expand(s / t, x)

    raw = __call__


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.centred])
def test_a_centred_jump_moves_with_the_data(name: str) -> None:
    t, s = pairs(12)
    x = torch.randn(len(t), 1, 2, 2, dtype=torch.float64, generator=seeded())
    mean = torch.tensor([[[0.5, -2.0], [3.0, 0.0]]], dtype=torch.float64)
    jumps = [
        build_preconditioning(name, 0.5, wiggly_ode(centre=each)).jump(Shifted(each), x + each, t, s) - each
        for each in (torch.zeros_like(mean), mean)
    ]
    torch.testing.assert_close(*jumps, rtol=1e-9, atol=1e-9)
    around_0 = build_preconditioning(name.removesuffix("-centred"), 0.5, wiggly_ode())
    torch.testing.assert_close(jumps[0], around_0.jump(Shifted(torch.zeros_like(mean)), x, t, s), rtol=0, atol=0)


def test_coefficients_do_not_depend_on_the_company_they_are_evaluated_in() -> None:
    ode = wiggly_ode()
    t, s = pairs()
    f, g = ode.backward(t, s)
    for i in (0, 7, 333, len(t) - 1):
        alone = ode.backward(t[i : i + 1], s[i : i + 1])
        torch.testing.assert_close(alone, (f[i : i + 1], g[i : i + 1]), rtol=1e-14, atol=1e-15)


def test_the_order_of_the_nodes_does_not_matter() -> None:
    t, s = pairs(10)
    flipped = GeneralizedODE(TIMES.flip(0), L.flip(0), S.flip(0))
    torch.testing.assert_close(flipped.backward(t, s), wiggly_ode().backward(t, s), rtol=1e-12, atol=1e-14)


def test_times_outside_the_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0\.002, 80\]"):
        wiggly_ode().backward(torch.tensor([100.0]), torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("times", "l", "message"),
    [
        ([1.0], [0.0], "at least two"),
        ([1.0, 1.0], [0.0, 0.0], "different"),
        ([1.0, -1.0], [0.0, 0.0], "positive"),
        ([2.0, 1.0], [0.0, float("nan")], "finite"),
    ],
)
def test_unusable_nodes_are_refused(times: list[float], l: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneralizedODE(torch.tensor(times), torch.tensor(l), torch.zeros(len(l)))


def test_analytic_without_coefficients_is_refused() -> None:
    for name in ("analytic", "analytc"):
        with pytest.raises(ValueError, match=f"no preconditioning '{name}': without fitted coefficients there are"):
            build_preconditioning(name, 0.5)
    with pytest.raises(ValueError, match="analytic-centred needs a fit around the mean image"):
        build_preconditioning("analytic-centred", 0.5, wiggly_ode())
