"""l_t and s_t without Jacobians, from a denoiser's displacements of its noised images (ours).

Gaussian integration by parts over the noise of x_t = x_0 + t z gives AP (15) for any denoiser,
    l_t = 1 - E tr(dD/dx) / d = 1 - E[z . D(x_t, t)] / (d t).
Where D is the exact denoiser, (x - D) / t is the velocity v_t of the PF-ODE and x_t has the same law on the ODE's paths
as on the lines x_0 + t z. Then AP (17) is a slope, and l_t the velocity discrepancy R_t of independent pairs:
    s_t = E[h . h'] / E ||h||^2 = d/dlambda log E ||h||^2 / 2       h = D - (1 - l_t) x
    l_t = E ||v_t||^2 / d = 1 - R_t / d.
So log L = int l and S = rms(h): evaluations at x_0 + t z and x_0 - t z are enough (the pair frees the estimate of l_t
of its largest error), where AP (15) and (17) take at least three, two of them with derivatives. Where a network is not
the exact denoiser, its l_t is still that of AP (15) and its s_t only near that of AP (17).
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from consistency.theory.estimators import Array, CoefficientFit, rounding_floor, settled, standard_error
from consistency.theory.solver import DenoiserFn, every


def fit_without_derivatives(
    denoiser: Callable[[slice], DenoiserFn],
    images: Tensor,
    noise: Tensor,
    times: Tensor,
    batch: int,
) -> CoefficientFit:
    """Fit l_t and s_t at each time with two evaluations per image; arguments as for `fit_coefficients`.

    The same images and noise serve every time, so that the curves are smooth in t and can be differentiated. Raises
    ValueError if the denoiser returns NaN or infinity.
    """
    moments = np.empty((len(times), 5, len(images)))
    rows = [slice(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    for k in range(len(times)):
        for part in rows:
            moments[k, :, part] = move_moments(denoiser(part), images[part], noise[part], times[k].item())
    if not np.isfinite(moments).all():
        bad = ", ".join(
            f"{t:g}" for t, each in zip(times.tolist(), moments, strict=True) if not np.isfinite(each).all()
        )
        raise ValueError(f"the denoiser returned NaN or infinity at t = {bad}")
    return solve_moves(times.double().cpu().numpy(), moments, images[0].numel(), images.dtype)


@torch.no_grad()
def move_moments(denoiser: DenoiserFn, images: Tensor, noise: Tensor, time: float) -> Array:
    """Return per image r.r, r.x, x.x, z.r, z.z with x = x_0 + t z, r = D - x, means over z and -z. [5, K], float64."""
    total = np.zeros((5, len(images)))
    for z in (noise, -noise):
        x = images + time * z
        move = denoiser(x, every(time, x).to(x.dtype)) - x
        pairs = [(move, move), (move, x), (x, x), (z, move), (z, z)]
        products = [(a.double() * b.double()).flatten(1).sum(1) for a, b in pairs]
        total += torch.stack(products).cpu().numpy() / 2
    return total


def solve_moves(times: Array, moments: Array, dimension: int, precision: torch.dtype) -> CoefficientFit:
    """Return l_t and s_t from the per-image moments [N, 5, K] of `move_moments`, with delta-method standard errors.

    precision: the dtype in which the denoiser computed.
    """
    rr, rx, xx, zr, zz = moments.transpose(1, 0, 2)
    lam, scale = -np.log(times), dimension * times[:, None]
    # z . z / d - 1 has mean 0: with it the estimate is sharp at large t, without it at small t. They change over where
    # t^2 is E ||x_0||^2 / d, estimated at the smallest time: only the error depends on it.
    blend = (times**2 / (times**2 + xx[np.argmin(times)].mean() / dimension))[:, None]
    each = -zr / scale + blend * (1 - zz / dimension)
    l = each.mean(1)
    c = l[:, None]
    h_h = rr + 2 * c * rx + c**2 * xx
    size = h_h.mean(1)
    floor = rounding_floor(rr, xx, l, precision)
    safe = np.maximum(size, floor)
    s = CubicSpline(lam, 0.5 * np.log(safe))(lam, 1)
    influence = (h_h - size[:, None] + 2 * (rx + c * xx).mean(1, keepdims=True) * (each - c)) / safe[:, None]
    s_se = standard_error(CubicSpline(lam, 0.5 * influence)(lam, 1))
    return settled(times, (l, standard_error(each)), (s, s_se), size > floor)


def gaussian_coefficients(mean: Tensor, covariance: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """l_t and s_t of the Gaussian with that mean [d] and covariance [d, d], each float64 [N]: no network, no training.

    times: [N] > 0. A linear denoiser misses by at least as much as the exact one, so this l_t is a lower bound on that
    of any data with these moments. Where h = 0 (an isotropic covariance around 0) s_t is -1, as ctm's.
    """
    # The smallest eigenvalues of a covariance are 0 up to rounding, of either sign.
    variances = torch.linalg.eigvalsh(covariance.double().cpu()).clamp(min=0)
    centre = mean.double().cpu().square().sum()
    t = times.double().cpu()[:, None]
    gain = variances / (variances + t**2)
    total = variances + t**2
    l = 1 - gain.mean(1)
    rate = 2 * gain * (1 - gain)  # d gain / d lambda, along the ODE
    spread = gain - gain.mean(1, keepdim=True)
    change = rate - rate.mean(1, keepdim=True) + spread * (gain - 1)
    along = (spread * change * total).sum(1) - centre * l * rate.mean(1)
    size = (spread**2 * total).sum(1) + centre * l**2
    floor = 1e-12 * ((1 - gain) ** 2 * total).sum(1)
    return l, torch.where(size > floor, along / torch.where(size > floor, size, 1.0), -1.0)
