"""EDM's loss of the teacher."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from consistency.nets.denoiser import Denoiser
from consistency.theory.noise import lognormal_sigma
from consistency.training.objective import Draws, Shape, Term, normal, weighted_denoising_error, with_labels


@dataclass(frozen=True)
class Noising(Draws):
    """Noise levels [N] and noise [N, C, H, W]."""

    sigma: Tensor
    z: Tensor


@dataclass(frozen=True)
class Denoising:
    """EDM's training loss of the teacher: ln sigma ~ N(p_mean, p_std^2), EDM's weight."""

    model: Denoiser
    p_mean: float
    p_std: float

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> Noising:
        """Draw a noise level and noise for every image."""
        return Noising(lognormal_sigma(shape[0], self.p_mean, self.p_std, device), normal(shape, device))

    def terms(self, images: Tensor, labels: Tensor | None, draws: Noising) -> Iterator[Term]:
        """Yield the weighted denoising error."""
        denoise = with_labels(self.model, labels)
        value = weighted_denoising_error(denoise, images, draws.sigma, self.model.sigma_data, draws.z)
        yield Term("denoising", value, 1.0, 3 * len(images))
