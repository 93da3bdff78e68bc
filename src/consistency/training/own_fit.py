"""Fits of l_t and s_t without a teacher (ours), which a student keeps in the buffer `fit` beside its weights.

The first fit is that of the Gaussian with the data's mean and covariance. A student that has a DSM term also learns a
denoiser, D_theta(x, t, t), and its EMA can be fitted again in the middle of the training.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consistency.base.errors import UserError
from consistency.data.prepared import ImageData
from consistency.nets.denoiser import Denoiser
from consistency.nets.own_preconditioning import ode_of
from consistency.runtime.distributed import Ranks
from consistency.theory.derivative_free import fit_without_derivatives, gaussian_coefficients
from consistency.theory.solver import DenoiserFn

#: most images from which the data's mean and covariance are computed
IMAGES = 50_000
_ROWS = 4096  # images at once


def covariance_fit(data: ImageData, times: Tensor) -> Tensor:
    """Return times, l_t and s_t, float64 [3, N], of the Gaussian with the data's mean and covariance (of at most 50,000
    images, evenly spread)."""
    rows = np.unique(np.linspace(0, len(data) - 1, min(len(data), IMAGES)).round().astype(np.int64))
    pixels = int(np.prod(data.shape))
    total, products = torch.zeros(pixels, dtype=torch.float64), torch.zeros(pixels, pixels, dtype=torch.float64)
    for first in range(0, len(rows), _ROWS):
        images = data.take(rows[first : first + _ROWS])[0].flatten(1).double()
        total += images.sum(0)
        products.addmm_(images.T, images)
    mean = total / len(rows)
    l, s = gaussian_coefficients(mean, products / len(rows) - torch.outer(mean, mean), times)
    return torch.stack([times.double().cpu(), l, s])


def diagonal_fit(
    ema: Denoiser, images: Tensor, labels: Tensor | None, noise: Tensor, times: Tensor, batch: int
) -> Tensor:
    """Return times, l_t and s_t, float64 [3, N], of the denoiser D(x, t, t) of a student's EMA, from two
    evaluations per image and time.

    images, noise: [K, C, H, W]; labels: [K] or None; times: [N]; batch: images per evaluation. Raises ValueError if the
    EMA returns NaN, or a jump of the fit is singular.
    """

    def own(rows: slice) -> DenoiserFn:
        # E[x_0 | x_t] as far as the DSM term has brought it there; without that term it is untrained.
        return lambda x, t: ema(x, t, t, None if labels is None else labels[rows])

    found = fit_without_derivatives(own, images, noise, times, batch)
    fit = torch.from_numpy(np.stack([found.times, found.l, found.s]))
    if not ode_of(fit).is_regular():
        raise ValueError("the fitted l_t, s_t give a singular jump")
    return fit


@dataclass(frozen=True)
class Refits:
    """Refits of l_t and s_t, one before the first step of each new stage of a training.

    stage: maps a step to its stage; student, emas: carry the fit, which is made from the first EMA; images,
    noise: [K, C, H, W], in the precision of the fit, labels: [K] or None, times: [N], batch: as for `diagonal_fit`.
    """

    stage: Callable[[int], int]
    student: Denoiser
    emas: list[Denoiser]
    images: Tensor
    labels: Tensor | None
    noise: Tensor
    times: Tensor
    batch: int
    ranks: Ranks

    def __call__(self, step: int) -> int:
        """Refit if this step (from 0) begins a stage. Returns the evaluations made; raises UserError for a bad fit."""
        if not step or self.stage(step) == self.stage(step - 1):
            return 0
        # A copy, because the fit has its own precision whatever that of the training.
        ema = copy.deepcopy(self.emas[0]).to(self.images.dtype).compute_in("float32")
        try:
            fit = diagonal_fit(ema, self.images, self.labels, self.noise, self.times, self.batch)
        except ValueError as error:
            raise UserError(
                f"refit of the coefficients at step {step}: {error}; raise dsm_weight or coefficients.samples, or use "
                "fit: data"
            ) from None
        # All processes have computed it; the first one's is used, to the bit.
        here = self.ranks.gathered(fit.to(next(self.student.parameters()).device))[:3]
        for model in (self.student, *self.emas):
            model.set_own_fit(here)
        return 2 * len(self.times) * len(self.images)
