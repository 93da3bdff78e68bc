"""The effect of a coupling of data and noise on consistency training, measured where the denoiser is known exactly.

Every coupling moves x_t = x + t z along its own noise, dx_t/dt = z; the velocity of its flow is v_t(x) =
E[z | x_t = x]. Consistency training uses z where distillation uses v_t: the velocity discrepancy R_t =
E ||z - v_t(x_t)||^2 is the error of one sample, the limit of N^alpha (L_CT - L_CD) its effect on the loss (GC).
Norms are sums over dimensions; nothing is divided by d.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.func import jvp

from consistency.theory.coupling import Predictor, assignment, generated
from consistency.theory.noise import rho_grid
from consistency.theory.oracles import MixtureTeacher, exact_endpoint
from consistency.theory.solver import DenoiserFn, every, expand

# (x [K, d], t [K]) -> [K, d]: a velocity, or a consistency function to eps.
Field = Callable[[Tensor, Tensor], Tensor]
Coupling = Literal["ic", "ot", "gc"]


@dataclass(frozen=True)
class Pairs:
    """Paired data and noise, [K, d] each, and the weight of each pair [K]; the weights sum to 1."""

    data: Tensor
    noise: Tensor
    weight: Tensor

    def at(self, t: float) -> Tensor:
        """Return x_t = x + t z, [K, d]."""
        return self.data + t * self.noise

    def mean(self, values: Tensor) -> float:
        """Return the weighted mean of one number per pair, [K]."""
        return float((self.weight * values).sum())


def drawn_pairs(data: Tensor, generator: torch.Generator) -> Pairs:
    """Draw data [K, d] with independent noise, equally weighted."""
    noise = torch.randn(data.shape, generator=generator, dtype=data.dtype)
    return Pairs(data, noise, torch.full((len(data),), 1 / len(data), dtype=data.dtype))


def quadrature_pairs(mixture: MixtureTeacher, points: int = 64) -> Pairs:
    """Return the independent pairs of a one-dimensional mixture as Gauss-Hermite nodes: means over them are
    expectations, exact for polynomials of degree 2 points - 1 in data and noise of a component."""
    node, mass = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(points))
    mass = mass / mass.sum()
    data = mixture.means[:, :1] + torch.sqrt(mixture.variances)[:, None] * node  # [M, P]
    shape = (len(data), points, points)
    weight = mixture.weights[:, None, None] * mass[:, None] * mass
    return Pairs(
        data[:, :, None].expand(shape).reshape(-1, 1), node.expand(shape).reshape(-1, 1), weight.expand(shape).flatten()
    )


def exact_predictor(teacher: DenoiserFn, sigma_min: float = 0.002) -> Predictor:
    """The endpoint predictor of a perfectly trained consistency model: the PF-ODE's own endpoint at sigma_min.

    All rows of a call must have the same time.
    """
    return lambda x, t: torch.from_numpy(exact_endpoint(teacher, x, t[0].item(), sigma_min, tolerance=1e-7))


def coupled(
    coupling: Coupling, pairs: Pairs, t: float, predictor: Predictor | None = None, batch: int | None = None
) -> Pairs:
    """Return the pairs of a coupling at time t, made from independent ones.

    ot: noise re-paired by exact assignment within consecutive batches of that size (None: all at once). gc: the data
    replaced by predictor(x_t, t). Raises ValueError for gc without a predictor.
    """
    if coupling == "ic":
        return pairs
    if coupling == "ot":
        size = batch or len(pairs.data)
        rows = [slice(k, k + size) for k in range(0, len(pairs.data), size)]
        noise = torch.cat([pairs.noise[r][assignment(pairs.data[r], pairs.noise[r])] for r in rows])
        return Pairs(pairs.data, noise, pairs.weight)
    if predictor is None:
        raise ValueError("coupling gc needs an endpoint predictor")
    everyone = torch.ones(len(pairs.data), dtype=torch.bool)
    data = generated(predictor, pairs.data, pairs.noise, every(t, pairs.data), everyone)
    return Pairs(data, pairs.noise, pairs.weight)


def transport_cost(pairs: Pairs) -> float:
    """Return E ||x - z||^2, the cost of moving the noise to its paired data."""
    return pairs.mean((pairs.data - pairs.noise).square().sum(1))


def discrepancy_by_neighbours(pairs: Pairs, t: float) -> float:
    """Estimate R_t of any coupling from drawn pairs alone: E ||z - z'||^2 / 2 over nearest neighbours x_t, x_t'.

    Two pairs at the same x_t have independent noise, so half their squared difference is the noise's conditional
    variance. The bias is half of E ||v(x_t) - v(x_t')||^2, so the best linear v is removed first; the rest of the bias
    falls as the squared distance of neighbours, K^(-2/d): for one and two dimensions. Devroye et al. 2013.
    """
    x = pairs.at(t)
    linear = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    # The default driver, gelsy, rounds differently from call to call where MKL runs on an Intel processor.
    residual = pairs.noise - linear @ torch.linalg.lstsq(linear, pairs.noise, driver="gelsd").solution
    neighbour = torch.from_numpy(cKDTree(x.numpy()).query(x.numpy(), k=2)[1][:, 1])
    return pairs.mean(0.5 * (residual - residual[neighbour]).square().sum(1))


@dataclass(frozen=True)
class FlowCurves:
    """R_t and transport cost of a coupling at times [T], with standard errors over the repetitions; each [T]."""

    times: np.ndarray
    discrepancy: np.ndarray
    discrepancy_se: np.ndarray
    cost: np.ndarray
    cost_se: np.ndarray


def flow_curves(
    coupling: Coupling,
    sample: Callable[[int, torch.Generator], Tensor],
    times: Tensor,
    seed: int,
    *,
    predictor: Predictor | None = None,
    batch: int = 512,
    count: int = 20_480,
    repetitions: int = 4,
) -> FlowCurves:
    """Estimate both measures by Monte Carlo on count pairs, repeated with fresh ones; the same pairs serve every time.

    sample(count, generator) gives data [count, d]. Couplings of one seed are compared on the same data and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    values = np.empty((2, repetitions, len(times)))
    for repetition in range(repetitions):
        pairs = drawn_pairs(sample(count, generator), generator)
        # The assignment does not depend on time: it is made once.
        pairs = coupled("ot", pairs, 0.0, batch=batch) if coupling == "ot" else pairs
        for k, t in enumerate(times.tolist()):
            here = coupled("gc", pairs, t, predictor) if coupling == "gc" else pairs
            values[:, repetition, k] = discrepancy_by_neighbours(here, t), transport_cost(here)
    error = values.std(1, ddof=1) / np.sqrt(repetitions)
    mean = values.mean(1)
    return FlowCurves(times.numpy(), mean[0], error[0], mean[1], error[1])


@dataclass(frozen=True)
class ConsistencyLosses:
    """L_CT and L_CD of a consistency function f on grids of N intervals, and the limits of N^alpha L.

    With the distance ||a - b||^alpha, and a mean over the intervals (u, t) of the grid,
        L_CT = E w(t) ||f(x_t, t) - f(x_u, u)||^alpha            both on the line x + t z
        L_CD = E w(t) ||f(x_t, t) - f(x_t - (t-u) v_t, u)||^alpha   one Euler step of the flow.
    On the rho grid t = tau(r), r in [0, 1], a pair's difference is tau'(r) / N times a derivative of f, so
        N^alpha L_CT -> int w tau'^alpha E ||df/dt + df/dx z||^alpha dr,
    and L_CD likewise with v in place of z. The difference is >= 0, for v_t = E[z | x_t] and the norm is convex; for
    alpha = 2 it is int w tau'^2 E ||df/dx (z - v_t)||^2 dr, R_t seen through f's Jacobian. Equal steps are rho = 1:
    tau' = T - eps, and the integral is (T - eps)^(alpha-1) times one over t. A distance phi(||a - b||) with
    phi(x) ~ C x^alpha near 0 has C times these limits: pseudo-Huber alpha = 2 and C = 1 / (2 c).

    pairs(t): the coupling at level t, whose data serve the level above too; velocity: v_t of its flow; weight: w(t).
    """

    f: Field
    velocity: Field
    pairs: Callable[[float], Pairs]
    alpha: float = 2.0
    weight: Callable[[float], float] = lambda t: 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def on_grid(self, intervals: int) -> tuple[float, float]:
        """Return (L_CT, L_CD) on the grid of that many intervals."""
        grid = rho_grid(intervals + 1, self.sigma_min, self.sigma_max, self.rho).tolist()
        ct = cd = 0.0
        for t, u in itertools.pairwise(grid):
            pairs = self.pairs(u)
            x, above, below = pairs.at(t), every(t, pairs.data), every(u, pairs.data)
            here, step = self.f(x, above), x - (t - u) * self.velocity(x, above)
            share = self.weight(t) / intervals
            ct += share * pairs.mean(self._size(here - self.f(pairs.at(u), below)))
            cd += share * pairs.mean(self._size(here - self.f(step, below)))
        return ct, cd

    def limits(self, nodes: int = 64) -> tuple[float, float]:
        """Return (lim N^alpha L_CT, lim N^alpha L_CD), by Gauss-Legendre quadrature over r on that many nodes."""
        point, mass = np.polynomial.legendre.leggauss(nodes)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        ct = cd = 0.0
        for r, share in zip((point + 1) / 2, mass / 2, strict=True):
            root = low + r * (high - low)
            t, slope = root**self.rho, self.rho * root ** (self.rho - 1) * (high - low)
            pairs = self.pairs(t)
            x = pairs.at(t)
            scale = share * self.weight(t) * slope**self.alpha
            ct += scale * pairs.mean(self._size(self._along(x, t, pairs.noise)))
            cd += scale * pairs.mean(self._size(self._along(x, t, self.velocity(x, every(t, x)))))
        return ct, cd

    def _along(self, x: Tensor, t: float, direction: Tensor) -> Tensor:
        """df/dt + df/dx direction, [K, d]."""
        times = every(t, x)
        return jvp(self.f, (x, times), (direction, torch.ones_like(times)))[1]

    def _size(self, difference: Tensor) -> Tensor:
        return torch.linalg.vector_norm(difference, dim=1) ** self.alpha


def pf_ode_velocity(denoiser: DenoiserFn) -> Field:
    """v_t of the independent coupling: (x - D(x, t)) / t."""
    return lambda x, t: (x - denoiser(x, t)) / expand(t, x)
