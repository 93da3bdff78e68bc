"""l_t and s_t without Jacobians, from how far a denoiser moves and how far it misses (ours).

Where D is the exact denoiser E[x_0 | x_t], v_t = (x - D) / t is the velocity of the PF-ODE and x_t has the same law on
the ODE's paths as on the lines x_0 + t z. Gaussian integration by parts and the orthogonality of x_0 - D then give
    l_t = 1 - E tr(dD/dx) / d = E ||v_t||^2 / d = 1 - R_t / d      R_t: the velocity discrepancy of independent pairs
    s_t = E[h . h'] / E ||h||^2 = d/dlambda log E ||h||^2 / 2       h = D - (1 - l_t) x
so that Analytic-Precond's log L = int l and S = rms(h) are two curves that any denoiser offers with one evaluation an
image and time, where AP (15) and (17) take 3 and more with derivatives. For a denoiser that is off by e, l_t is off in
second order of e at large t (||x_0 - D||^2 decides there), in first order at small t (||v_t||^2 does).
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from consistency.theory.estimators import Array, CoefficientFit, require_finite, settled
from consistency.theory.solver import DenoiserFn, every


def fit_without_derivatives(
    denoiser: Callable[[slice], DenoiserFn],
    images: Tensor,
    noise: Tensor,
    times: Tensor,
    batch: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> CoefficientFit:
    """Fit l_t and s_t at each time with one evaluation an image; arguments as for `fit_coefficients`.

    The same images and noise serve every time, so that the curves are smooth in t and can be differentiated. Raises
    ValueError if the denoiser returns NaN or infinity.
    """
    moments = np.empty((len(times), 4, len(images)))
    rows = [slice(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    for k in progress(range(len(times))):
        for part in rows:
            moments[k, :, part] = error_moments(denoiser(part), images[part], noise[part], times[k].item())
    require_finite(times, moments)
    return solve_errors(times.double().cpu().numpy(), moments, images[0].numel())


@torch.no_grad()
def error_moments(denoiser: DenoiserFn, images: Tensor, noise: Tensor, time: float) -> Array:
    """Per image: r.r, r.x, x.x with x = x_0 + t z and r = D - x, and ||x_0 - D||^2. [4, K], float64."""
    x = images + time * noise
    move = denoiser(x, every(time, x).to(x.dtype)) - x
    pairs = [(move, move), (move, x), (x, x)]
    miss = images - x - move
    products = [(a.double() * b.double()).flatten(1).sum(1) for a, b in [*pairs, (miss, miss)]]
    return torch.stack(products).cpu().numpy()


def solve_errors(times: Array, moments: Array, dimension: int) -> CoefficientFit:
    """l_t and s_t from the per-image moments [N, 4, K] of `error_moments`, with delta-method standard errors."""
    rr, rx, xx, miss = moments.transpose(1, 0, 2)
    count, lam, scale = rr.shape[1], -np.log(times), dimension * times[:, None] ** 2
    # l is known twice, as ||v||^2 / d and as 1 - ||z - v||^2 / d: the first is sharp at small t, the second at large t.
    # Where they change over, E ||x_0||^2 / d, is read at the smallest time: only the errors depend on it.
    moment = xx[np.argmin(times)].mean() / dimension
    blend = (times**2 / (times**2 + moment))[:, None]
    each = (1 - blend) * rr / scale + blend * (1 - miss / scale)
    l = each.mean(1)
    c = l[:, None]
    h_h = rr + 2 * c * rx + c**2 * xx
    size = h_h.mean(1)
    floor = 1e-12 * (rr + c**2 * xx).mean(1) + np.finfo(float).tiny
    safe = np.maximum(size, floor)
    s = CubicSpline(lam, 0.5 * np.log(safe))(lam, 1)
    influence = (h_h - size[:, None] + 2 * (rx + c * xx).mean(1, keepdims=True) * (each - c)) / safe[:, None]
    s_se = CubicSpline(lam, 0.5 * influence)(lam, 1).std(1, ddof=1) / np.sqrt(count)
    l_se = each.std(1, ddof=1) / np.sqrt(count)
    return settled(times, (l, l_se), (s, s_se), size > floor)
