"""Teachers in closed form, and the method's exact results for them.

They are denoisers like any other, (x [N, d], t [N]) -> [N, d], so the code that runs on a network runs on them.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from consistency.theory.estimators import Array, CoefficientFit, fit_coefficients, image_moments, solve_moments
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import rho_grid
from consistency.theory.preconditioning import build_preconditioning


@dataclass(frozen=True)
class GaussianTeacher:
    """The exact denoiser of data ~ N(0, diag(variances)): D(x, t) = c / (c + t^2) x."""

    variances: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [N, d]; t: [N]; returns [N, d]."""
        return self.variances / (self.variances + t[:, None] ** 2) * x

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw count samples of the data, [count, d]."""
        shape = (count, len(self.variances))
        return torch.sqrt(self.variances) * torch.randn(shape, generator=generator, dtype=self.variances.dtype)

    def flow(self, x: Tensor, t: float, s: float) -> Tensor:
        """Return the exact solution at time s of the PF-ODE through x at time t."""
        return torch.sqrt((self.variances + s**2) / (self.variances + t**2)) * x

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return l_t and s_t in closed form, each [N]. s_t is NaN if all variances are equal (then h = 0)."""
        c, t = self.variances.double(), times.double()[:, None]
        gain = c / (c + t**2)
        mean = gain.mean(1, keepdim=True)
        rate = 2 * gain * (1 - gain)  # d gain / d lambda
        spread = gain - mean
        change = rate - rate.mean(1, keepdim=True) + spread * (gain - 1)
        second = c + t**2  # E[x_t^2]
        return 1 - mean[:, 0], (spread * change * second).sum(1) / (spread**2 * second).sum(1)


@dataclass(frozen=True)
class MixtureTeacher:
    """The exact denoiser of a mixture of isotropic Gaussians. weights [M], means [M, d], variances [M]."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [N, d]; t: [N]; returns [N, d]."""
        total = self.variances + t[:, None] ** 2  # [N, M]
        offset = x[:, None] - self.means  # [N, M, d]
        dimension = self.means.shape[1]
        log_density = torch.log(self.weights) - 0.5 * dimension * torch.log(total) - 0.5 * (offset**2).sum(2) / total
        posterior = self.means + (self.variances / total)[..., None] * offset
        return (torch.softmax(log_density, 1)[..., None] * posterior).sum(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw count samples of the data, [count, d]."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + torch.sqrt(self.variances[which])[:, None] * z

    def density(self, x: Array, time: float) -> Array:
        """The density of x_t for one-dimensional data. x: [N]; returns [N]."""
        w, m, v = (a.numpy() for a in (self.weights, self.means[:, 0], self.variances))
        total = v + time**2
        return (w * np.exp(-((x[:, None] - m) ** 2) / (2 * total)) / np.sqrt(2 * np.pi * total)).sum(1)


#: the 1-D mixture of the oracle checks
MIXTURE_1D = MixtureTeacher(
    torch.tensor([1 / 3, 2 / 3], dtype=torch.float64),
    torch.tensor([[-2.0], [1.0]], dtype=torch.float64),
    torch.tensor([1.0, 0.25], dtype=torch.float64),
)

#: mean squared error of the n-step endpoint, n = 1, 2, 3, 5, 8: the printed digits
MIXTURE_TABLE: dict[str, dict[int, str]] = {
    "ctm": {1: "2.402", 2: "0.731", 3: "0.745", 5: "0.291", 8: "0.137"},
    "analytic": {1: "2.407", 2: "0.683", 3: "0.572", 5: "0.246", 8: "0.140"},
    "analytic-forward": {1: "0.341", 2: "0.193", 3: "0.120", 5: "0.0385", 8: "0.0257"},
}
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def _quadrature(width: float, points: int) -> tuple[Array, Array]:
    """Trapezoid nodes and weights on [-width, width] (spectrally accurate for a decaying smooth integrand)."""
    x = np.linspace(-width, width, points)
    return x, np.full(points, x[1] - x[0])


def mixture_coefficients(
    times: Tensor, points: int = 1601, progress: Callable[[list[float]], Iterable[float]] = iter
) -> CoefficientFit:
    """l_t and s_t of the 1-D mixture by quadrature over q(x_t), at log-spaced times [N]."""
    moments = []
    for time in progress(times.tolist()):
        x, step = _quadrature(2 + 12 * np.hypot(1, time), points)
        weight = step * MIXTURE_1D.density(x, time)
        rows = torch.from_numpy(x)[:, None]
        moments.append(image_moments(MIXTURE_1D, rows, time, None) * (weight / weight.sum() * points))
    return solve_moments(times.numpy(), np.stack(moments), 1, torch.float64, drawn=False)


def mixture_endpoint_error(jump: Callable[[Tensor, Tensor, Tensor], Tensor], steps: int) -> float:
    """Mean squared error of the n-step endpoint to the exact ODE endpoint, by quadrature over x_T ~ N(0, 80^2).

    jump(x [N, 1], t [N], s [N]) is the consistency function.
    """
    x, step = _quadrature(8 * SIGMA_MAX, 4001)
    weight = step * np.exp(-(x**2) / (2 * SIGMA_MAX**2)) / np.sqrt(2 * np.pi) / SIGMA_MAX
    y = torch.from_numpy(x)[:, None]
    times = rho_grid(steps + 1, SIGMA_MIN, SIGMA_MAX)
    for t, s in itertools.pairwise(times):
        y = jump(y, t.expand(len(y)), s.expand(len(y)))
    return float(((y[:, 0].numpy() - _mixture_endpoints()) ** 2 * weight).sum())


@cache
def _mixture_endpoints() -> Array:
    """The exact endpoint of every x_T of the quadrature."""
    x = torch.from_numpy(_quadrature(8 * SIGMA_MAX, 4001)[0])[:, None]
    return exact_endpoint(MIXTURE_1D, x, SIGMA_MAX, SIGMA_MIN)[:, 0]


def exact_endpoint(
    teacher: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: float, s: float, tolerance: float = 1e-10
) -> Array:
    """The PF-ODE's endpoint at time s through x [N, d] at time t, by an adaptive 8th-order solver in lambda."""

    def slope(lam: float, flat: Array) -> Array:
        point = torch.from_numpy(flat.reshape(x.shape))
        time = torch.full((len(x),), float(np.exp(-lam)), dtype=torch.float64)
        return (teacher(point, time) - point).numpy().ravel()

    span = (-np.log(t), -np.log(s))
    solution = solve_ivp(slope, span, x.numpy().ravel(), "DOP853", rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise ValueError(f"the reference solver failed: {solution.message}")
    return solution.y[:, -1].reshape(x.shape)


def mixture_table(fit: CoefficientFit) -> dict[str, dict[int, float]]:
    """Compute our fifteen numbers of the 1-D mixture's table from its coefficients; 1,000 times give all digits.

    Returns {preconditioning: {steps: error}}.
    """
    ode = GeneralizedODE(*fit.nodes)
    table = {}
    for name, row in MIXTURE_TABLE.items():
        preconditioning = build_preconditioning(name, sigma_data=0.5, ode=ode)

        def jump(x: Tensor, t: Tensor, s: Tensor, preconditioning=preconditioning) -> Tensor:  # type: ignore[no-untyped-def]
            f, g = preconditioning.coefficients(t, s)
            return f[:, None] * x + g[:, None] * MIXTURE_1D(x, t)

        table[name] = {steps: mixture_endpoint_error(jump, steps) for steps in row}
    return table


def gaussian_fit(
    variances: Sequence[float], times: Tensor, samples: int, probes: int | None, seed: int
) -> CoefficientFit:
    """Fit an anisotropic Gaussian with the estimators, for comparison with its closed form."""
    generator = torch.Generator().manual_seed(seed)
    teacher = GaussianTeacher(torch.tensor(variances, dtype=torch.float64))
    draws = torch.randn(2, samples, len(variances), generator=generator, dtype=torch.float64)
    images = torch.sqrt(teacher.variances) * draws[0]
    return fit_coefficients(lambda rows: teacher, images, draws[1], times, probes, generator, batch=samples)
