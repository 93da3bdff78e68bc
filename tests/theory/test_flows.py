"""Velocity discrepancy, transport cost and the theorem's limit against their closed forms."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.draws import SEED, seeded
from torch import Tensor

from consistency.theory.flows import (
    ConsistencyLosses,
    Field,
    Pairs,
    coupled,
    discrepancy_by_neighbours,
    drawn_pairs,
    exact_predictor,
    flow_curves,
    pf_ode_velocity,
    quadrature_pairs,
    transport_cost,
)
from consistency.theory.noise import log_grid, rho_grid
from consistency.theory.oracles import MIXTURE_1D, GaussianTeacher, MixtureTeacher, mixture_coefficients
from consistency.theory.solver import every, expand

GAUSSIAN = GaussianTeacher(torch.tensor([0.1, 1.5], dtype=torch.float64))
C = GAUSSIAN.variances
TIMES = torch.tensor([0.1, 0.5, 2.0, 20.0], dtype=torch.float64)


def slope(t: Tensor | float) -> Tensor:
    """k_j = df_j/dx_j of the exact endpoint (eps = 0) of a Gaussian: sqrt(c / (c + t^2))."""
    return torch.sqrt(C / (C + t**2))


def gaussian_endpoint(x: Tensor, t: Tensor) -> Tensor:
    return slope(t[:, None]) * x


# x_t = k x* + (1 + k) t z for gc with the exact endpoint k (x* + t z), jointly Gaussian with z.


def ic_discrepancy(t: float) -> float:
    return float((C / (C + t**2)).sum())


def gc_discrepancy(t: float) -> float:
    return float((C**2 / ((C + t**2) * (C + t**2 + 2 * slope(t) * t**2))).sum())


def gc_cost(t: float) -> float:
    return float((C + 1 - 2 * t * slope(t)).sum())


def gc_velocity(x: Tensor, t: Tensor) -> Tensor:
    t = t[:, None]
    k = slope(t)
    return t * (1 + k) / (C + t**2 + 2 * k * t**2) * x


# --- the measures


def velocity_error(pairs: Pairs, t: float, velocity: Field) -> float:
    """E ||z - v(x_t, t)||^2: R_t if v is the velocity of the coupling's own flow."""
    x = pairs.at(t)
    return pairs.mean((pairs.noise - velocity(x, every(t, x))).square().sum(1))


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    generator = seeded()
    return drawn_pairs(GAUSSIAN.sample(40_000, generator), generator)


@pytest.mark.statistical
@pytest.mark.parametrize("t", TIMES.tolist())
def test_discrepancy_of_ic_in_closed_form(pairs: Pairs, t: float) -> None:
    assert velocity_error(pairs, t, pf_ode_velocity(GAUSSIAN)) == pytest.approx(ic_discrepancy(t), rel=0.05)
    assert discrepancy_by_neighbours(pairs, t) == pytest.approx(ic_discrepancy(t), rel=0.05)


@pytest.mark.statistical
@pytest.mark.parametrize("t", TIMES.tolist())
def test_discrepancy_and_cost_of_gc_in_closed_form(pairs: Pairs, t: float) -> None:
    found = coupled("gc", pairs, t, gaussian_endpoint)
    assert discrepancy_by_neighbours(found, t) == pytest.approx(gc_discrepancy(t), rel=0.05, abs=1e-5)
    assert transport_cost(found) == pytest.approx(gc_cost(t), rel=0.04)
    assert gc_discrepancy(t) < ic_discrepancy(t)


def test_the_cost_of_gc_falls_from_ic_s_to_the_optimal_one() -> None:
    costs = [gc_cost(t) for t in np.logspace(-3, 3, 40)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(float((C + 1).sum()), rel=0.01)
    assert costs[-1] == pytest.approx(float(((1 - C.sqrt()) ** 2).sum()), rel=0.01)


@pytest.mark.statistical
@pytest.mark.parametrize("t", TIMES.tolist())
def test_another_velocity_can_only_add_to_the_discrepancy(pairs: Pairs, t: float) -> None:
    found = coupled("gc", pairs, t, gaussian_endpoint)
    own = velocity_error(found, t, gc_velocity)
    assert own == pytest.approx(gc_discrepancy(t), rel=0.05)
    assert velocity_error(found, t, pf_ode_velocity(GAUSSIAN)) > own


def test_l_is_one_minus_the_velocity_discrepancy_per_dimension() -> None:
    """The two papers' quantities are one: AP (15) against GC's R_t, both by quadrature."""
    times, pairs = log_grid(9, 0.05, 20.0), quadrature_pairs(MIXTURE_1D, 80)
    found = [1 - velocity_error(pairs, t, pf_ode_velocity(MIXTURE_1D)) for t in times.tolist()]
    np.testing.assert_allclose(found, mixture_coefficients(times).l, rtol=0, atol=1e-4)


@pytest.mark.statistical
def test_ot_lies_between_ic_and_the_optimum_and_nears_it_with_its_batch(pairs: Pairs) -> None:
    some = Pairs(*(v[:4096] for v in (pairs.data, pairs.noise)), torch.full((4096,), 1 / 4096, dtype=torch.float64))
    best = float(((1 - C.sqrt()) ** 2).sum())
    by_batch = [coupled("ot", some, 1.0, batch=size) for size in (1, 16, 256)]
    costs = [transport_cost(paired) for paired in by_batch]
    assert costs[0] == transport_cost(some)
    assert costs[0] > costs[1] > costs[2] > best
    discrepancies = [discrepancy_by_neighbours(paired, 1.0) for paired in by_batch]
    assert discrepancies[0] > discrepancies[1] > discrepancies[2]


@pytest.mark.statistical
def test_on_the_toy_gc_ends_below_ot_and_ot_leads_at_small_times() -> None:
    """Two tight modes in the plane, with the exact PF-ODE endpoint as predictor. In so few dimensions a batch of 64 is
    assigned almost optimally, and gc, which starts from ic at small t, is below it only once t is large."""
    teacher = MixtureTeacher(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([[0.0, -0.5], [0.0, 0.5]], dtype=torch.float64),
        torch.tensor([1e-4, 1e-4], dtype=torch.float64),
    )
    times = torch.tensor([1.0, 5.0], dtype=torch.float64)
    settings = {"batch": 64, "count": 2048, "repetitions": 3}
    curves = {
        name: flow_curves(name, teacher.sample, times, SEED, predictor=exact_predictor(teacher), **settings)
        for name in ("ic", "ot", "gc")
    }
    for measure in ("discrepancy", "cost"):
        ic, ot, gc = (getattr(curves[name], measure) for name in ("ic", "ot", "gc"))
        assert gc[1] < ot[1] < 0.7 * ic[1], measure
        assert ot[0] < gc[0] < 0.7 * ic[0], measure
    assert bool((curves["ic"].cost_se > 0).all())


@pytest.mark.statistical
@pytest.mark.parametrize(("dimension", "first"), [(2, "ot"), (64, "gc")])
def test_the_paper_s_order_of_costs_holds_in_many_dimensions(dimension: int, first: str) -> None:
    """The price of mini-batches: in 64 dimensions ot gains little from a batch of 64, and gc is cheaper from t = 1."""
    teacher = GaussianTeacher(torch.full((dimension,), 0.25, dtype=torch.float64))
    generator = seeded()
    some = drawn_pairs(teacher.sample(16_384, generator), generator)
    ot = transport_cost(coupled("ot", some, 1.0, batch=64))
    gc = transport_cost(coupled("gc", some, 1.0, lambda x, t: teacher.flow(x, t[0].item(), 0.0)))
    assert max(ot, gc) < transport_cost(some)
    assert (gc < ot) == (first == "gc")


def test_curves_are_a_function_of_the_seed() -> None:
    one, same, other = (
        flow_curves("ic", GAUSSIAN.sample, TIMES, seed, count=256, repetitions=2).discrepancy for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_quadrature_pairs_have_the_mixture_s_moments() -> None:
    found = quadrature_pairs(MIXTURE_1D, 16)
    w, m, v = MIXTURE_1D.weights, MIXTURE_1D.means[:, 0], MIXTURE_1D.variances
    assert found.mean(torch.ones_like(found.weight)) == pytest.approx(1, rel=1e-12)
    assert found.mean(found.data[:, 0] ** 3) == pytest.approx(float((w * (m**3 + 3 * m * v)).sum()), rel=1e-10)
    assert found.mean(found.noise[:, 0] ** 4) == pytest.approx(3, rel=1e-10)
    assert found.mean(found.noise[:, 0] * found.data[:, 0]) == pytest.approx(0, abs=1e-12)


def test_gc_without_a_predictor_is_refused(pairs: Pairs) -> None:
    with pytest.raises(ValueError, match="predictor"):
        coupled("gc", pairs, 1.0)


# --- the theorem


def gaussian_pairs() -> Pairs:
    """Exact moments up to a high degree of data ~ N(0, diag C) in two dimensions, by quadrature a dimension: for sums
    over dimensions only the marginals count."""
    node, mass = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(40))
    mass = mass / mass.sum()
    x, z = (v.flatten() for v in torch.meshgrid(node, node, indexing="ij"))
    weight = (mass[:, None] * mass).flatten()
    return Pairs(torch.sqrt(C) * x[:, None], z[:, None].expand(-1, 2), weight)


def converging(values: list[float], limit: float) -> None:
    """Each doubling of N about halves, or more, the error to the limit."""
    errors = [abs(value - limit) for value in values]
    for a, b in itertools.pairwise(errors):
        assert a > 1.6 * b, errors
    assert errors[-1] < 0.02 * abs(limit)


def test_the_gap_of_an_exact_consistency_function_of_a_gaussian() -> None:
    """N^2 L_CD -> 0, and N^2 L_CT -> (T - eps) sum_j int c_j^2 / (c_j + t^2)^2 dt, an arctangent."""
    low, high = 0.01, 4.0
    times = {"sigma_min": low, "sigma_max": high, "rho": 1.0}
    losses = ConsistencyLosses(gaussian_endpoint, pf_ode_velocity(GAUSSIAN), lambda t: gaussian_pairs(), **times)

    def primitive(t: float) -> Tensor:
        root = torch.sqrt(C)
        return C**2 * (t / (2 * C * (C + t**2)) + torch.arctan(t / root) / (2 * root**3))

    closed = float((high - low) * (primitive(high) - primitive(low)).sum())
    ct, cd = losses.limits()
    assert ct == pytest.approx(closed, rel=1e-6)
    assert cd == pytest.approx(0, abs=1e-12)
    found = [(n**2 * a, n**2 * b) for n in (100, 200, 400) for a, b in [losses.on_grid(n)]]
    converging([a - b for a, b in found], closed)
    assert found[-1][0] - found[-1][1] == pytest.approx(closed, rel=0.01)


@pytest.mark.statistical
def test_the_gap_with_the_norm_itself() -> None:
    """alpha = 1 in one dimension: |z - v| is half-normal, E = sqrt(2 / pi) times its deviation."""
    c, low, high = 0.5, 0.05, 3.0
    times = {"sigma_min": low, "sigma_max": high, "rho": 1.0}
    teacher = GaussianTeacher(torch.tensor([c], dtype=torch.float64))
    generator = seeded()
    drawn = drawn_pairs(teacher.sample(200_000, generator), generator)

    def endpoint(x: Tensor, t: Tensor) -> Tensor:
        return torch.sqrt(c / (c + t[:, None] ** 2)) * x

    losses = ConsistencyLosses(endpoint, pf_ode_velocity(teacher), lambda t: drawn, alpha=1.0, **times)
    root = math.sqrt(c)
    closed = math.sqrt(2 / math.pi) * c * (math.atan(high / root) - math.atan(low / root)) / root
    ct, cd = losses.limits(24)
    assert ct - cd == pytest.approx(closed, rel=0.01)
    a, b = losses.on_grid(60)
    assert 60 * (a - b) == pytest.approx(closed, rel=0.03)


@pytest.mark.parametrize("weight", [lambda t: 1.0, lambda t: 1 / (1 + t)], ids=["one", "falling"])
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_the_gap_of_any_function_on_the_mixture(rho: float, weight: Callable[[float], float]) -> None:
    """f is no consistency function at all here (the denoiser): both losses have limits, the gap is the Jacobian's."""
    drawn = quadrature_pairs(MIXTURE_1D, 40)
    times = {"sigma_min": 0.2, "sigma_max": 5.0, "rho": rho}
    losses = ConsistencyLosses(MIXTURE_1D, pf_ode_velocity(MIXTURE_1D), lambda t: drawn, weight=weight, **times)
    ct, cd = losses.limits()
    assert 0 < cd < ct
    found = [(n**2 * a, n**2 * b) for n in (100, 200, 400) for a, b in [losses.on_grid(n)]]
    converging([a for a, _ in found], ct)
    converging([b for _, b in found], cd)
    converging([a - b for a, b in found], ct - cd)


def test_for_squares_the_gap_is_the_discrepancy_seen_through_the_jacobian() -> None:
    """f = x: the Jacobian is one and the gap int tau' R_t dt."""
    drawn = quadrature_pairs(MIXTURE_1D, 40)
    losses = ConsistencyLosses(
        lambda x, t: x + 0 * expand(t, x), pf_ode_velocity(MIXTURE_1D), lambda t: drawn, sigma_min=0.2, sigma_max=5.0
    )
    ct, cd = losses.limits()
    fine = rho_grid(4001, 0.2, 5.0).flip(0)
    slopes = torch.gradient(fine, spacing=1 / 4000)[0]
    values = torch.tensor([velocity_error(drawn, t, pf_ode_velocity(MIXTURE_1D)) for t in fine[::40].tolist()])
    assert ct - cd == pytest.approx(torch.trapezoid(values.double() * slopes[::40] ** 2, dx=0.01).item(), rel=1e-3)


def test_the_generator_s_flow_has_the_smaller_gap() -> None:
    """gc on a Gaussian, with its own velocity in closed form; the same f and grid."""
    low, high = 0.01, 4.0
    independent = gaussian_pairs()
    settings = {"sigma_min": low, "sigma_max": high, "rho": 1.0}
    ic = ConsistencyLosses(gaussian_endpoint, pf_ode_velocity(GAUSSIAN), lambda t: independent, **settings)
    gc = replace(ic, velocity=gc_velocity, pairs=lambda t: coupled("gc", independent, t, gaussian_endpoint))
    (ic_ct, ic_cd), (gc_ct, gc_cd) = ic.limits(), gc.limits()
    fine = torch.linspace(low, high, 20_001, dtype=torch.float64)[:, None]
    k = slope(fine)
    seen = k**2 * C**2 / ((C + fine**2) * (C + fine**2 + 2 * k * fine**2))
    closed = (high - low) * torch.trapezoid(seen.sum(1), fine[:, 0]).item()
    assert gc_ct - gc_cd == pytest.approx(closed, rel=1e-5)
    assert gc_ct - gc_cd < 0.7 * (ic_ct - ic_cd)
    a, b = gc.on_grid(400)
    assert 400**2 * (a - b) == pytest.approx(closed, rel=0.02)
