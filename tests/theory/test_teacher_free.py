"""What denoisers a consistency student offers, on data where its consistency function is known."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.draws import seeded
from torch import Tensor

from consistency.theory.derivative_free import fit_without_derivatives
from consistency.theory.noise import log_grid
from consistency.theory.oracles import MIXTURE_1D, GaussianTeacher, exact_endpoint, mixture_coefficients
from consistency.theory.preconditioning import ctm
from consistency.theory.solver import every, expand
from consistency.theory.teacher_free import at_end, diagonal, gaussian_coefficients, tangent

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


def endpoint(x: Tensor, t: Tensor) -> Tensor:
    c = TEACHER.variances
    return torch.sqrt((c + EPS**2) / (c + t[:, None] ** 2)) * x


@pytest.mark.parametrize("t", [0.01, 0.5, 30.0])
def test_the_tangent_of_an_exact_consistency_function_is_the_denoiser(t: float) -> None:
    x = torch.randn(6, 3, dtype=torch.float64, generator=seeded())
    time = every(t, x)
    torch.testing.assert_close(tangent(endpoint)(x, time), TEACHER(x, time), rtol=1e-8, atol=1e-10)


def test_the_tangent_asks_only_that_f_is_constant_along_the_flow() -> None:
    """So is any function of f; a linear one has a Jacobian that is not symmetric."""
    mixing = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64, generator=seeded())
    time = every(0.5, x)
    found = tangent(lambda y, t: endpoint(y, t) @ mixing.T)(x, time)
    torch.testing.assert_close(found, TEACHER(x, time), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("t", [0.1, 1.0, 4.0])
def test_the_tangent_on_a_mixture_whose_flow_is_not_linear(t: float) -> None:
    """The consistency function by the reference solver, its derivatives by interpolation on a fine table in x and t."""
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    h = 1e-4

    class Table(torch.autograd.Function):
        """f with tangents by central differences: the solver is no torch operation."""

        @staticmethod
        def forward(x: Tensor, t: Tensor) -> Tensor:
            return torch.from_numpy(exact_endpoint(MIXTURE_1D, x.detach(), t[0].item(), EPS, 1e-12))

        @staticmethod
        def setup_context(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_forward(*inputs)  # type: ignore[attr-defined]

        @staticmethod
        def jvp(ctx: object, dx: Tensor | None, dt: Tensor | None) -> Tensor:
            x, t = ctx.saved_tensors  # type: ignore[attr-defined]
            along_x = 0 if dx is None else (Table.apply(x + h * dx, t) - Table.apply(x - h * dx, t)) / (2 * h)
            along_t = 0 if dt is None else (Table.apply(x, t + h * dt) - Table.apply(x, t - h * dt)) / (2 * h)
            return along_x + along_t

    time = every(t, x)
    found = tangent(Table.apply)(x, time)
    torch.testing.assert_close(found, MIXTURE_1D(x, time), rtol=1e-4, atol=1e-4)


@pytest.mark.statistical
def test_diagonal_and_tangent_give_the_teacher_s_coefficients_at_end_does_not() -> None:
    images, noise = draws()
    student = PerfectStudent(TEACHER)
    l, s = (v.numpy() for v in TEACHER.coefficients(TIMES))
    exact = {"diagonal": diagonal(student), "tangent": tangent(endpoint)}
    for denoiser in exact.values():
        fit = fit_without_derivatives(lambda rows, d=denoiser: d, images, noise, TIMES, 4096)
        assert bool((abs(fit.l - l) < 5 * fit.l_se).all())
        assert bool((abs(fit.s - s) < 1e-3 + 5 * fit.s_se).all())
    fit = fit_without_derivatives(lambda rows: at_end(student, EPS), images, noise, TIMES, 4096)
    middle = (TIMES.numpy() > 0.3) & (TIMES.numpy() < 5)
    assert bool((abs(fit.l - l)[middle] > 10 * fit.l_se[middle]).all())


@pytest.mark.parametrize("t", [0.05, 0.5, 5.0])
def test_at_end_is_biased_towards_the_endpoint_as_described(t: float) -> None:
    x = torch.ones(1, 3, dtype=torch.float64)
    gain = at_end(PerfectStudent(TEACHER), EPS)(x, every(t, x))[0]
    c = TEACHER.variances
    torch.testing.assert_close(gain, torch.sqrt(c / (c + t**2)), rtol=0, atol=0.05)
    assert bool((gain > TEACHER(x, every(t, x))[0]).all())


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
    assert bool((l < own + 0.03 * (1 - own)).all())
    assert np.max(own - l) > 0.05
