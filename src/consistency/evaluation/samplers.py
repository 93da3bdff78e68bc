"""Samplers of teachers and students; image i comes from seed i."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from consistency.base.seeding import ImageNoise
from consistency.config.dataset import Noise
from consistency.config.job import Job
from consistency.config.study import Study
from consistency.nets.denoiser import Denoiser
from consistency.runtime.distributed import ALONE, Ranks
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.sampler import Churn, Fresh, multistep, stochastic_heun
from consistency.theory.solver import heun_solve
from consistency.training.build import place
from consistency.training.fits import time_grid
from consistency.training.objective import with_labels

# Maps the noise of a batch of images to their endpoints, float [N, C, H, W].
Sampler = Callable[[ImageNoise], Tensor]


@torch.inference_mode()
def draw(
    size: int,
    model: Denoiser,
    sampler: Sampler,
    count: int,
    classes: Sequence[int],
    first_seed: int,
    start: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield this process's images start to count-1 in batches of that size: (rows, float [n, C, H, W]). classes: the
    relative frequency of each of the model's classes; first_seed: that of image 0, from which the others count up."""
    for first in range(start + ranks.rank * size, count, ranks.world * size):
        rows = slice(first, min(first + size, count))
        noise = ImageNoise(range(first_seed + rows.start, first_seed + rows.stop), model.shape, classes)
        yield rows, sampler(noise)


def prepared(study: Study, model: Denoiser) -> Denoiser:
    """Return a model in the precision and the memory layout of the study's sampling."""
    device = next(model.parameters()).device
    return place(study.compute, model, device).compute_in(study.sampling.precision)


def heun_sampler(study: Study, teacher: Denoiser, nodes: int | None = None) -> Sampler:
    """Return EDM's sampler with the study's settings; with nodes, the ODE's endpoint at eps through that many nodes."""
    device = next(teacher.parameters()).device
    times = _times(study.noise, nodes or study.calibration.steps) + ([0.0] if nodes is None else [])
    settings = study.calibration.churn if nodes is None else None

    def sample(noise: ImageNoise) -> Tensor:
        x = _to(noise.latents, device) * times[0]
        denoiser = with_labels(teacher, _labels(noise, device))
        if settings is None:
            return heun_solve(denoiser, x, times)
        added = Churn(settings.s_churn, settings.s_min, settings.s_max, settings.s_noise)

        def in_float32(x: Tensor, t: Tensor) -> Tensor:
            """Evaluate the network on a float64 state, whose rounding does not add up over hundreds of steps."""
            return denoiser(x.float(), t).double()

        return stochastic_heun(in_float32, x.double(), times, added, _fresh(noise, device))

    return sample


def jump_sampler(job: Job, model: Denoiser, preconditioning: Preconditioning, nfe: int, gamma: float = 0.0) -> Sampler:
    """Return a sampler of a study's student: nfe jumps along the study's rho grid."""
    return jumps_along(job.study.noise, model, preconditioning, nfe, 1.0 if job.settings.only_to_eps else gamma)


def jumps_along(noise: Noise, model: Denoiser, preconditioning: Preconditioning, nfe: int, gamma: float) -> Sampler:
    """Return a sampler of nfe jumps along the rho grid from sigma_max to sigma_min."""
    device = next(model.parameters()).device
    times = _times(noise, nfe + 1)

    def sample(noise: ImageNoise) -> Tensor:
        labels = _labels(noise, device)

        def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return preconditioning.jump(model, x, t, s, labels)

        return multistep(jump, _to(noise.latents, device) * times[0], times, gamma, _fresh(noise, device))

    return sample


def _times(noise: Noise, nodes: int) -> list[float]:
    """Return the rho grid as numbers: reading each back from a GPU would stall it."""
    return time_grid(noise, nodes).tolist()


def _labels(noise: ImageNoise, device: torch.device) -> Tensor | None:
    return None if noise.labels is None else _to(noise.labels, device)


def _fresh(noise: ImageNoise, device: torch.device) -> Fresh:
    return lambda: _to(noise.fresh(), device)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device. Only copies from pinned memory do not wait for a GPU's queue."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
