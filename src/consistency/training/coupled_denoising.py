"""The denoiser of a coupling's own flow, for measuring its velocity discrepancy (GC; theory/flows.py)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from consistency.nets.denoiser import Denoiser
from consistency.theory.coupling import generator_mask
from consistency.theory.noise import lognormal_sigma
from consistency.theory.solver import every, expand
from consistency.training.consistency_training import ConsistencyTraining, CoupledPairs, TransportTraining
from consistency.training.objective import Shape, Term, normal, weighted_denoising_error, with_labels


def velocity_error(denoiser: Denoiser, data: Tensor, labels: Tensor | None, z: Tensor, t: float) -> Tensor:
    """Return ||z - (x_t - D) / t||^2 = ||x - D||^2 / t^2 of x_t = x + t z, [N]: a sum over pixels."""
    times = every(t, data)
    error = denoiser(data + expand(times, data) * z, times, labels=labels) - data
    return (error.double() / t).square().flatten(1).sum(1)


@dataclass(frozen=True)
class CoupledDenoising:
    """EDM's loss on the coupled images: D(x_t, t) of x_t = x_hat + t z approaches E[x_hat | x_t], so that (x_t - D) / t
    approaches the flow's velocity E[z | x_t].

    coupling: makes x_hat from images and noise; it is not trained. ln t ~ N(p_mean, p_std^2), t clamped to its ends.
    """

    model: Denoiser
    coupling: ConsistencyTraining
    p_mean: float = -1.2
    p_std: float = 1.2

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> CoupledPairs:
        """Draw a level, noise and the mask of generated images."""
        t = lognormal_sigma(shape[0], self.p_mean, self.p_std, device).clamp(*self.coupling.ends)
        return self.pairs(t, normal(shape, device), device)

    def pairs(self, t: Tensor, z: Tensor, generator: torch.Generator) -> CoupledPairs:
        """Return the draws of images with noise z [N, C, H, W] at levels t [N]; generator: draws the generated ones."""
        mask = generator_mask(len(z), self.coupling.mu, generator)
        return CoupledPairs(t, t, torch.ones_like(t), z, mask, None, None)

    def terms(self, images: Tensor, labels: Tensor | None, draws: CoupledPairs) -> Iterator[Term]:
        """Yield the weighted denoising error of the coupled images."""
        data = self.coupling.coupled(images, labels, draws)
        denoise = with_labels(self.model, labels)
        value = weighted_denoising_error(denoise, data, draws.t, self.model.sigma_data, draws.z)
        yield Term("denoising", value, 1.0, (3 + (1 if self.coupling.mu else 0)) * len(images))

    @torch.no_grad()
    def discrepancy(
        self, denoiser: Denoiser, images: Tensor, labels: Tensor | None, z: Tensor, t: float, generator: torch.Generator
    ) -> Tensor:
        """Return ||z - (x_t - D) / t||^2 of each coupled image, [N]."""
        data = self.coupling.coupled(images, labels, self.pairs(every(t, images), z, generator))
        return velocity_error(denoiser, data, labels, z, t)


@dataclass(frozen=True)
class TransportDenoising(CoupledDenoising):
    """The same for ot, whose noise is exchanged among the images of the whole batch."""

    coupling: TransportTraining

    def pair(self, images: Tensor, labels: Tensor | None, draws: CoupledPairs) -> CoupledPairs:
        """Return the draws with their noise exchanged."""
        return self.coupling.pair(images, labels, draws)
