"""What denoisers a consistency student offers, on data where its consistency function is known."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.draws import seeded
from torch import Tensor

from consistency.theory.derivative_free import fit_without_derivatives
from consistency.theory.noise import log_grid
from consistency.theory.oracles import MIXTURE_1D, GaussianTeacher, mixture_coefficients
from consistency.theory.preconditioning import ctm
from consistency.theory.solver import expand
from consistency.theory.teacher_free import diagonal, gaussian_coefficients

EPS = 0.002
TEACHER = GaussianTeacher(torch.tensor([0.05, 0.3, 1.2], dtype=torch.float64))
TIMES = log_grid(30, 0.01, 20.0)


@dataclass
class PerfectStudent:
    """D_theta(x, t, s) of a ctm student whose jumps are the exact flow of a Gaussian, and the denoiser at s = t."""

    teacher: GaussianTeacher

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        c = self.teacher.variances
        flow = torch.sqrt((c + s[:, None] ** 2) / (c + t[:, None] ** 2)) * x
        f, g = ctm(t, s)
        jump = (flow - expand(f, x) * x) / expand(torch.where(g > 0, g, 1.0), x)
        return torch.where((g > 0)[:, None], jump, self.teacher(x, t))

    raw = __call__


def draws(count: int = 4096) -> tuple[Tensor, Tensor]:
    generator = seeded()
    images = TEACHER.sample(count, generator)
    return images, torch.randn(images.shape, generator=generator, dtype=images.dtype)


@pytest.mark.statistical
def test_the_diagonal_gives_the_teacher_s_coefficients() -> None:
    images, noise = draws()
    denoiser = diagonal(PerfectStudent(TEACHER))
    l, s = (v.numpy() for v in TEACHER.coefficients(TIMES))
    fit = fit_without_derivatives(lambda rows: denoiser, images, noise, TIMES, 4096)
    assert bool((abs(fit.l - l) < 5 * fit.l_se).all())
    assert bool((abs(fit.s - s) < 1e-3 + 5 * fit.s_se).all())


def turned(seed: int = 0) -> Tensor:
    """A rotation of three dimensions."""
    return torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=seeded(seed)))[0]


def test_the_coefficients_of_a_gaussian_are_those_of_its_covariance_however_it_is_turned() -> None:
    covariance = turned() @ torch.diag(TEACHER.variances) @ turned().T
    found = gaussian_coefficients(torch.zeros(3), covariance, TIMES)
    for own, exact in zip(found, TEACHER.coefficients(TIMES), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-9, atol=1e-9)


def test_the_mean_of_a_gaussian_counts_in_s_alone() -> None:
    """Against d/dlambda log E||h||^2 / 2 with E||h||^2 = d l (l (m + t^2) - t^2), m = E||x_0||^2 / d."""
    times, mean = log_grid(4000, 0.01, 20.0), torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    l, s = gaussian_coefficients(mean, torch.diag(TEACHER.variances), times)
    torch.testing.assert_close(l, TEACHER.coefficients(times)[0])
    moment = (TEACHER.variances.sum() + mean.square().sum()) / 3
    size = l * (l * (moment + times**2) - times**2)
    growth = np.gradient(0.5 * np.log(size.numpy()), -np.log(times.numpy()))
    np.testing.assert_allclose(s[5:-5].numpy(), growth[5:-5], rtol=0, atol=1e-4)
    assert float((s - TEACHER.coefficients(times)[1]).abs().max()) > 0.1


def test_an_isotropic_covariance_gives_ctm() -> None:
    l, s = gaussian_coefficients(torch.zeros(4), 0.25 * torch.eye(4), TIMES)
    torch.testing.assert_close(l, TIMES**2 / (0.25 + TIMES**2))
    assert bool((s == -1).all())


def test_dimensions_without_variance_do_no_harm() -> None:
    """The digits' corners are white in all images; rounding makes their eigenvalues negative."""
    covariance = torch.diag(torch.tensor([1.0, 0.3, 0.0, -1e-17], dtype=torch.float64))
    l, s = gaussian_coefficients(torch.full((4,), 0.1), covariance, log_grid(50, 0.002, 80.0))
    assert bool((torch.isfinite(s) & (l > 0) & (l < 1)).all())


@pytest.mark.statistical
def test_the_covariance_alone_is_a_lower_bound_on_l() -> None:
    images, times = MIXTURE_1D.sample(20_000, seeded()), log_grid(20, 0.05, 20.0)
    l = gaussian_coefficients(images.mean(0), images.T.cov().reshape(1, 1), times)[0].numpy()
    own = mixture_coefficients(times).l
    # The covariance itself was sampled.
    assert bool((l < own + 0.05 * (1 - own)).all())
    assert np.max(own - l) > 0.05
