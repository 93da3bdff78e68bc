"""Denoisers of a model that was never taught by one: where l_t, s_t can come from in consistency training (ours).

A consistency student offers three. `diagonal` is a denoiser if the DSM term trained it. `tangent` is exact for an exact
consistency function, but inverts its Jacobian. `at_end` is neither: it is what the network computes for a jump to eps,
biased towards the endpoint, and here to measure that bias. `covariance_fit` needs no network at all.
"""

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from consistency.theory.derivative_free import fit_without_derivatives
from consistency.theory.estimators import CoefficientFit
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


def covariance_fit(images: Tensor, noise: Tensor, times: Tensor) -> CoefficientFit:
    """l_t and s_t of the Gaussian with the images' mean and covariance: no network, no training, no cost.

    images, noise: [K, ...]; times: [N]. Its linear denoiser m + C (C + t^2)^-1 (x - m) misses by at least as much as
    the exact one, so this l_t is a lower bound on the data's own, up to sampling.
    """
    flat = images.flatten(1).double()
    mean = flat.mean(0)
    scale, axes = np.linalg.eigh(np.cov(flat.cpu().numpy(), rowvar=False).reshape(len(mean), len(mean)))
    variances, rotation = (torch.from_numpy(v).to(flat) for v in (scale.clip(min=0), axes))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        gain = variances / (variances + t.to(x)[:, None] ** 2)
        return mean + (gain * ((x - mean) @ rotation)) @ rotation.T

    return fit_without_derivatives(lambda rows: denoiser, flat, noise.flatten(1).double(), times, len(flat))
