"""l_t and s_t without derivatives against the closed forms, and against the fit with derivatives."""

import numpy as np
import pytest
import torch
from tests.draws import seeded
from torch import Tensor

from consistency.theory.derivative_free import fit_without_derivatives
from consistency.theory.estimators import fit_coefficients
from consistency.theory.flows import discrepancy_by_denoiser, quadrature_pairs
from consistency.theory.noise import log_grid
from consistency.theory.oracles import MIXTURE_1D, GaussianTeacher, MixtureTeacher, mixture_coefficients

VARIANCES = torch.tensor([0.01, 0.1, 0.25, 1.0, 2.0], dtype=torch.float64)
TIMES = log_grid(120, 0.002, 80.0)


def draws(teacher: GaussianTeacher | MixtureTeacher, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    images = teacher.sample(count, generator)
    return images, torch.randn(images.shape, generator=generator, dtype=images.dtype)


def test_l_is_one_minus_the_velocity_discrepancy_per_dimension() -> None:
    """The two papers' quantities are one: AP (15) against GC's R_t, both by quadrature."""
    times = log_grid(9, 0.05, 20.0)
    l = mixture_coefficients(times).l
    pairs = quadrature_pairs(MIXTURE_1D, 80)
    found = [1 - discrepancy_by_denoiser(pairs, t, MIXTURE_1D) for t in times.tolist()]
    np.testing.assert_allclose(found, l, rtol=0, atol=1e-4)


def test_s_is_the_growth_of_h() -> None:
    """AP (17) against d/dlambda log E||h||^2 / 2 with h's second moment in closed form, from l and E||x_0||^2 alone."""
    times = log_grid(300, 0.01, 20.0)
    fit = mixture_coefficients(times)
    t, w, m, v = times.numpy(), MIXTURE_1D.weights, MIXTURE_1D.means[:, 0], MIXTURE_1D.variances
    moment = float((w * (m**2 + v)).sum())
    size = fit.l * (fit.l * (moment + t**2) - t**2)
    growth = np.gradient(0.5 * np.log(size), -np.log(t))
    np.testing.assert_allclose(growth[5:-5], fit.s[5:-5], rtol=0, atol=2e-3)


@pytest.mark.statistical
def test_gaussian_coefficients_in_closed_form() -> None:
    teacher = GaussianTeacher(VARIANCES)
    images, noise = draws(teacher, 8192)
    fit = fit_without_derivatives(lambda rows: teacher, images, noise, TIMES, 1000)
    l, s = teacher.coefficients(TIMES)
    assert bool((abs(fit.l - l.numpy()) < 5 * fit.l_se).all())
    assert bool((abs(fit.s - s.numpy()) < 1e-3 + 5 * fit.s_se).all())
    assert abs(fit.l / l.numpy() - 1).max() < 0.06
    assert abs(fit.s - s.numpy()).max() < 0.06
    assert bool(fit.determined.all())


@pytest.mark.statistical
def test_standard_errors_tell_the_spread_between_fits() -> None:
    teacher, times = GaussianTeacher(VARIANCES), log_grid(12, 0.01, 20.0)
    fits = []
    for seed in range(40):
        images, noise = draws(teacher, 512, seed)
        fits.append(fit_without_derivatives(lambda rows: teacher, images, noise, times, 512))
    for value, error in (("l", "l_se"), ("s", "s_se")):
        spread = np.std([getattr(fit, value) for fit in fits], axis=0, ddof=1)
        ratio = np.mean([getattr(fit, error) for fit in fits], axis=0) / spread
        assert bool(((ratio > 0.6) & (ratio < 2)).all()), (value, ratio)


@pytest.mark.statistical
def test_both_fits_agree_on_a_mixture_in_the_plane() -> None:
    teacher = MixtureTeacher(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-1.0, 0.2], [0.5, 0.0]], dtype=torch.float64),
        torch.tensor([0.1, 0.02], dtype=torch.float64),
    )
    images, noise = draws(teacher, 8192)
    times = log_grid(60, 0.01, 5.0)
    plain = fit_without_derivatives(lambda rows: teacher, images, noise, times, 8192)
    exact = fit_coefficients(lambda rows: teacher, images, noise, times, None, seeded(), 8192)
    assert bool((abs(plain.l - exact.l) < 5 * np.hypot(plain.l_se, exact.l_se)).all())
    # The spline's slope errs by some 1e-3 at the first and last times, where the standard error is less.
    assert bool((abs(plain.s - exact.s) < 5e-3 + 5 * np.hypot(plain.s_se, exact.s_se)).all())


@pytest.mark.statistical
@pytest.mark.parametrize("error", [0.1, 0.5])
def test_l_is_that_of_AP_15_for_any_denoiser(error: float) -> None:
    """A denoiser that is off: both fits see its Jacobian, exact or not."""
    teacher = GaussianTeacher(VARIANCES)
    images, noise = draws(teacher, 20_000)
    times = log_grid(12, 0.01, 20.0)

    def off(x: Tensor, t: Tensor) -> Tensor:
        return teacher(x, t) + error * torch.sin(3 * x) / (1 + t[:, None])

    plain = fit_without_derivatives(lambda rows: off, images, noise, times, 20_000)
    exact = fit_coefficients(lambda rows: off, images, noise, times, None, seeded(), 20_000)
    assert bool((abs(plain.l - exact.l) < 5 * np.hypot(plain.l_se, exact.l_se)).all())
    assert abs(exact.l - teacher.coefficients(times)[0].numpy()).max() > 0.3 * error


def test_isotropic_gaussian_stays_finite_and_says_so() -> None:
    teacher = GaussianTeacher(torch.full((4,), 0.25, dtype=torch.float64))
    images, noise = draws(teacher, 64)
    fit = fit_without_derivatives(lambda rows: teacher, images, noise, log_grid(20, 0.002, 80.0), 64)
    for array in vars(fit).values():
        assert bool(np.isfinite(array).all())


def test_a_denoiser_that_returns_nan_is_named_with_its_time() -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] > 10, float("nan"), 0.5) * x

    images, noise = torch.randn(2, 8, 3, generator=seeded())
    with pytest.raises(ValueError, match="t = 80"):
        fit_without_derivatives(lambda rows: denoiser, images, noise, log_grid(9, 0.1, 80.0), 4)


def test_the_fit_does_not_depend_on_its_batch() -> None:
    images, noise = draws(MIXTURE_1D, 50)
    fits = [fit_without_derivatives(lambda rows: MIXTURE_1D, images, noise, log_grid(9, 0.1, 80.0), n) for n in (50, 7)]
    for a, b in zip(vars(fits[0]).values(), vars(fits[1]).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
