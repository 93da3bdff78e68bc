"""A rule of thumb, before any training: where the fitted preconditioning may train faster than ctm (ours)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from consistency.config.dataset import Noise
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.training.fits import time_grid

Array = np.ndarray[Any, Any]

#: a shortfall of g below which no gain has been seen
LEAST = 0.02


def forecast(fit: Mapping[str, Array], sigma_data: float, noise: Noise, nfes: Sequence[int]) -> list[str]:
    """Return sentences on the data and on the jumps at each NFE.

    fit: as in coefficients.npz; sigma_data: the standard deviation of all pixels. The error of the student's denoiser
    enters a jump times g(t, s): where the backward form's g is below ctm's, less of it does.
    """
    centre = fit["centre"].astype(np.float64)
    square = float(np.square(centre).mean())
    variance = sigma_data**2 + float(centre.mean()) ** 2 - square
    lines = [f"The mean image has a mean square of {square:.3f}, the pixels around it a variance of {variance:.3f}."]
    for name, column in (("analytic", "s"), ("analytic-centred", "s_centred")):
        times, l, s = map(torch.from_numpy, (fit["times"], fit["l"], fit[column]))
        ode = GeneralizedODE(times, l, s)
        below = {nfe: ode.shortfall(time_grid(noise, nfe + 1)) for nfe in nfes}
        said = ", ".join(f"{100 * share:.1f} % at NFE {nfe}" for nfe, share in below.items())
        gains = ", ".join(str(nfe) for nfe, share in below.items() if share > LEAST)
        where = f"at NFE {gains}" if gains else "nowhere"
        lines.append(f"{name}: g is below ctm's by up to {said}; expect a gain {where}.")
    return lines
