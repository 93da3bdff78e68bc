"""Times and images of a study: the rho grid of its jumps, and the data of its coefficient fits."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from consistency.base.seeding import generator
from consistency.config.dataset import Noise
from consistency.config.study import Study
from consistency.data.prepared import ImageData
from consistency.theory.estimators import CoefficientFit
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import log_grid, rho_grid
from consistency.theory.preconditioning import FORMS

#: nodes of the grid at whose jumps the error of a fit is known
NODES = 18


def time_grid(noise: Noise, nodes: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the rho grid of that many nodes, descending, float64."""
    return rho_grid(nodes, noise.sigma_min, noise.sigma_max, noise.rho).to(device)


def fitted_times(study: Study) -> Tensor:
    """The times [N] of the study's fits."""
    return log_grid(study.coefficients.times, study.noise.sigma_min, study.noise.sigma_max)


def study_jumps(study: Study) -> Callable[[CoefficientFit], np.ndarray]:
    """Return a function from a fit to f and g, in one row, for the study's students that use it: at the jumps between
    all nodes of a grid, or to eps."""
    users = [student for student in study.students.values() if student.needs_coefficients]
    used = [(FORMS[student.preconditioning], student) for student in users]
    steps = sorted({(form.centred, form.weight(student.theta), student.only_to_eps) for form, student in used})
    return jump_values(time_grid(study.noise, NODES), steps)


def jump_values(grid: Tensor, steps: Sequence[tuple[bool, float, bool]]) -> Callable[[CoefficientFit], np.ndarray]:
    """Return a function from a fit to f and g, in one row, at the jumps between all nodes of a grid.

    steps: whether around the mean image, the weight at s, and whether only to the last node.
    """
    first, last = torch.triu_indices(len(grid), len(grid), 1)

    def values(fit: CoefficientFit) -> np.ndarray:
        fits = {False: fit} | ({True: fit.centred} if fit.centred else {})
        odes = {centred: GeneralizedODE(*fits[centred].nodes) for centred in {step[0] for step in steps}}
        found: list[Tensor] = []
        for centred, weight, only_to_eps in steps:
            s = grid[-1].expand(len(first)) if only_to_eps else grid[last]
            found += odes[centred].step(grid[first], s, weight)
        return torch.cat(found).numpy()

    return values


def fitted_images(study: Study, data: ImageData, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the images [K, C, H, W] and noise of the study's fits, in the precision of the fits, and the labels [K]
    for a conditional network."""
    settings = study.coefficients
    draws = generator(settings.seed, "coefficients")
    # A repeated permutation uses every image equally often, as far as the numbers allow.
    rows = torch.cat([torch.randperm(len(data), generator=draws) for _ in range(-(-settings.samples // len(data)))])
    images, labels = data.take(rows[: settings.samples])
    noise = torch.randn(images.shape, generator=draws)
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    return images.to(device, dtype), labels.to(device) if study.teacher.conditional else None, noise.to(device, dtype)
