"""Denoisers of a model that was never taught by one: where l_t, s_t can come from in consistency training (ours).

`diagonal` is a student's own denoiser if the DSM term trained it; `gaussian_coefficients` needs no network at all.
"""

import torch
from torch import Tensor

from consistency.theory.preconditioning import StudentDenoiser
from consistency.theory.solver import DenoiserFn


def diagonal(student: StudentDenoiser, labels: Tensor | None = None) -> DenoiserFn:
    """D_theta(x, t, t): E[x_0 | x_t] as far as the DSM term has brought it there; without that term it is untrained."""
    return lambda x, t: student(x, t, t, labels)


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
