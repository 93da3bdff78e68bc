"""Trajectory distillation, AP (7): both sides are compared at the end, after a jump from s."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from consistency.config import objectives
from consistency.theory.noise import ctm_dsm_sigma
from consistency.theory.solver import expand
from consistency.training.distillation import Distillation
from consistency.training.objective import Basis, Draws, Shape, Term, normal, weighted_denoising_error


@dataclass(frozen=True)
class Jumps(Draws):
    """Draws of `Trajectory`. steps: the number n of teacher steps, for all images; first [N], to [N]: the nodes of t
    and s; z: noise of x_t; sigma, z_dsm: noise levels and noise of the DSM term, if there is one."""

    steps: int
    first: Tensor
    to: Tensor
    z: Tensor
    sigma: Tensor | None
    z_dsm: Tensor | None


@dataclass(frozen=True)
class Trajectory(Distillation):
    """Trajectory distillation, AP (7): CTM's objective and its denoising score matching term."""

    max_steps: int
    dsm_weight: float

    @classmethod
    def build(cls, settings: objectives.Trajectory, basis: Basis) -> Self:
        """Build the loss of a student."""
        return cls._build(settings, basis, max_steps=settings.most_steps, dsm_weight=settings.dsm_weight)

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> Jumps:
        """Draw n teacher steps per batch, P(n) ~ n; t, u = t + n nodes and s <= u of each image are uniform."""
        steps = int(torch.multinomial(torch.arange(1.0, self.max_steps + 1), 1, generator=host)) + 1
        uniform = torch.rand(2, shape[0], generator=device, device=device.device)
        first = (uniform[0] * (len(self.grid) - steps)).long()
        last = first + steps
        to = last + (uniform[1] * (len(self.grid) - last)).long()
        z = normal(shape, device)
        if not self.dsm_weight:
            return Jumps(steps, first, to, z, None, None)
        return Jumps(steps, first, to, z, ctm_dsm_sigma(shape[0], *self.ends, device), normal(shape, device))

    def terms(self, images: Tensor, labels: Tensor | None, draws: Jumps) -> Iterator[Term]:
        """Yield the distillation term, then the DSM term if it has a weight."""
        evaluations = 2 * draws.steps + 3 + 3 + 2
        yield Term("distillation", self.distillation(images, labels, draws), 1.0, evaluations * len(images))
        if draws.sigma is not None and draws.z_dsm is not None:
            value = self.denoising(images, labels, draws.sigma, draws.z_dsm)
            yield Term("dsm", value, self.dsm_weight, 3 * len(images))

    def distillation(self, images: Tensor, labels: Tensor | None, draws: Jumps) -> Tensor:
        """Compare both sides at the end of the trajectory, after a jump with the frozen EMA."""
        t, u, s = self.grid[draws.first], self.grid[draws.first + draws.steps], self.grid[draws.to]
        x_t = images + expand(t, images) * draws.z
        estimate = self.jump(self.student, x_t, t, s, labels)
        estimate = self.jump(self.ema, estimate, s, self.end(images), labels)
        with torch.no_grad():
            x_u = self.teacher_steps(x_t, draws.first, draws.steps, labels)
            target = self.jump(self.inner, x_u, u, s, labels)
            target = self.jump(self.ema, target, s, self.end(images), labels)
        return self.distance(estimate, target).mean()

    def denoising(self, images: Tensor, labels: Tensor | None, sigma: Tensor, z: Tensor) -> Tensor:
        """Return the DSM term: the student's D_theta(x_t, t, t) against x_0, with noise of its own."""
        sigma_data = self.student.sigma_data
        return weighted_denoising_error(lambda x, t: self.student(x, t, t, labels), images, sigma, sigma_data, z)
