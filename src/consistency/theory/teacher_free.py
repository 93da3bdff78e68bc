"""Denoisers of a model that was never taught by one: where l_t, s_t can come from in consistency training (ours).

A consistency student offers three. `diagonal` is a denoiser if the DSM term trained it. `tangent` is exact for an exact
consistency function, but inverts its Jacobian. `at_end` is neither: it is what the network computes for a jump to eps,
biased towards the endpoint, and here to measure that bias. `gaussian_coefficients` needs no network at all.
"""

import torch
from torch import Tensor
from torch.func import jvp

from consistency.theory.preconditioning import StudentDenoiser
from consistency.theory.solver import DenoiserFn, every, expand


def diagonal(student: StudentDenoiser, labels: Tensor | None = None) -> DenoiserFn:
    """D_theta(x, t, t): E[x_0 | x_t] as far as the DSM term has brought it there; without that term it is untrained."""
    return lambda x, t: student(x, t, t, labels)


def at_end(student: StudentDenoiser, sigma_min: float, labels: Tensor | None = None) -> DenoiserFn:
    """D_theta(x, t, eps), the D inside the jump to eps.

    With ctm it is (f - (eps/t) x) / (1 - eps/t), the endpoint itself at large t. On Gaussian data of variance c its
    gain is about sqrt(c / (c + t^2)) where a denoiser's is c / (c + t^2): l_t comes out too small at every t.
    """
    return lambda x, t: student(x, t, every(sigma_min, x), labels)


def tangent(function: DenoiserFn) -> DenoiserFn:
    """The denoiser x - t v of a consistency function f(x, t) [N, ...], v being the flow along which f is constant.

    df/dt + df/dx v = 0 gives v = -(df/dx)^-1 df/dt: d + 1 JVPs and a d x d solve an image. Exact if f is; in
    directions in which the data do not vary df/dx vanishes and v is noise, so: for few dimensions, all of them alive.
    """

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
        columns = [jvp(lambda y: function(y, t), (x,), (e.expand_as(x),))[1].flatten(1) for e in basis]
        change = jvp(lambda time: function(x, time), (t,), (torch.ones_like(t),))[1].flatten(1)
        velocity = -torch.linalg.solve(torch.stack(columns, 2), change)
        return x - expand(t, x) * velocity.reshape(x.shape)

    return denoiser


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
