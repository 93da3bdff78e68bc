"""The losses: EDM's for the teacher, trajectory (CTM) and endpoint (CM) distillation for students.

An objective is called once an optimiser step with a batch and the step's generator, and returns its terms as scalars
("loss" is what is minimised) and the network evaluations it made: a forward pass counts 1 an image and a backward
pass 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from consistency.nets.denoiser import Denoiser
from consistency.theory.distance import Distance
from consistency.theory.noise import ctm_dsm_sigma, edm_weight, lognormal_sigma
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.solver import DenoiserFn, expand, heun_step


@dataclass(frozen=True)
class Losses:
    """terms: scalars with gradients, among them "loss"; evaluations: forward-pass equivalents made."""

    terms: dict[str, Tensor]
    evaluations: int


class Objective(Protocol):
    """What the loop asks of a loss. images: float [N, C, H, W] in [-1, 1]; labels: int64 [N] or None."""

    def __call__(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Losses:
        """The terms of one step."""


def with_labels(denoiser: Denoiser, labels: Tensor | None) -> DenoiserFn:
    """The teacher D(x, t) of images with those labels."""
    return lambda x, t: denoiser(x, t, labels=labels)


def weighted_denoising_error(
    denoise: Callable[[Tensor, Tensor], Tensor], images: Tensor, sigma: Tensor, sigma_data: float, z: Tensor
) -> Tensor:
    """Mean of (sigma^2 + sd^2)/(sigma sd)^2 ||D(x_0 + sigma z, sigma) - x_0||^2 over images and pixels."""
    error = denoise(images + expand(sigma, images) * z, sigma) - images
    return (expand(edm_weight(sigma, sigma_data), images) * error.square()).mean()


@dataclass(frozen=True)
class Denoising:
    """EDM's training loss of the teacher."""

    model: Denoiser
    p_mean: float
    p_std: float

    def __call__(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Losses:
        """ln sigma ~ N(p_mean, p_std^2), EDM's weight."""
        sigma = lognormal_sigma(len(images), self.p_mean, self.p_std, generator).to(images.device)
        z = _noise_like(images, generator)
        loss = weighted_denoising_error(with_labels(self.model, labels), images, sigma, self.model.sigma_data, z)
        return Losses({"loss": loss}, 3 * len(images))


@dataclass(frozen=True)
class _Distillation:
    """What both distillations share. grid: descending float64 times [N] from sigma_max to sigma_min."""

    student: Denoiser
    average: Denoiser
    teacher: Denoiser
    preconditioning: Preconditioning
    distance: Distance
    grid: Tensor
    target: str

    @property
    def inner(self) -> Denoiser:
        """The weights of the target's inner jump."""
        return self.average if self.target == "ema" else self.student

    def jump(self, model: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """f_theta(x, t, s) of the given weights."""
        return self.preconditioning.jump(model, x, t, s, labels)

    @torch.no_grad()
    def teacher_steps(self, x: Tensor, first: Tensor, steps: int, labels: Tensor | None) -> Tensor:
        """x after that many Heun steps along the grid, from node first [N] on."""
        denoiser = with_labels(self.teacher, labels)
        for k in range(steps):
            x = heun_step(denoiser, x, self.grid[first + k], self.grid[first + k + 1])
        return x

    def end(self, like: Tensor) -> Tensor:
        """eps for every image of a batch."""
        return self.grid[-1].expand(len(like))


@dataclass(frozen=True)
class Trajectory(_Distillation):
    """Trajectory distillation, AP (7): CTM's objective and its denoising score matching term."""

    max_steps: int
    dsm_weight: float

    def __call__(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Losses:
        """n teacher steps a batch, P(n) ~ n; t, u = t + n nodes and s <= u of each image are uniform."""
        nodes, count, device = len(self.grid), len(images), images.device
        weights = torch.arange(1.0, self.max_steps + 1, device=generator.device)
        steps = int(torch.multinomial(weights, 1, generator=generator)) + 1
        uniform = torch.rand(2, count, generator=generator, device=generator.device)
        first = (uniform[0] * (nodes - steps)).long().to(device)
        last = first + steps
        to = last + (uniform[1].to(device) * (nodes - last)).long()
        t, u, s = self.grid[first], self.grid[last], self.grid[to]
        x_t = images + expand(t, images) * _noise_like(images, generator)
        # Both sides are compared where the trajectory ends, after a jump with the frozen average.
        estimate = self.jump(self.student, x_t, t, s, labels)
        estimate = self.jump(self.average, estimate, s, self.end(images), labels)
        with torch.no_grad():
            x_u = self.teacher_steps(x_t, first, steps, labels)
            target = self.jump(self.inner, x_u, u, s, labels)
            target = self.jump(self.average, target, s, self.end(images), labels)
        distillation = self.distance(estimate, target).mean()
        terms = {"loss": distillation, "distillation": distillation}
        evaluations = 2 * steps + 3 + 3 + 2
        if self.dsm_weight:
            terms["dsm"] = self.denoising(images, labels, generator)
            terms["loss"] = distillation + self.dsm_weight * terms["dsm"]
            evaluations += 3
        return Losses(terms, count * evaluations)

    def denoising(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """DSM: the student's D_theta(x_t, t, t) against x_0, with fresh noise."""
        ends = self.grid[-1].item(), self.grid[0].item()
        sigma = ctm_dsm_sigma(len(images), *ends, generator).to(images.device)
        z = _noise_like(images, generator)
        sigma_data = self.student.sigma_data
        return weighted_denoising_error(lambda x, t: self.student(x, t, t, labels), images, sigma, sigma_data, z)


@dataclass(frozen=True)
class Endpoint(_Distillation):
    """Endpoint distillation, AP (5): neighbouring grid times t > u, both jumps to eps."""

    def __call__(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Losses:
        """One teacher step from a uniform node."""
        count, device = len(images), images.device
        first = torch.randint(len(self.grid) - 1, (count,), generator=generator, device=generator.device).to(device)
        t, u = self.grid[first], self.grid[first + 1]
        x_t = images + expand(t, images) * _noise_like(images, generator)
        estimate = self.jump(self.student, x_t, t, self.end(images), labels)
        with torch.no_grad():
            x_u = self.teacher_steps(x_t, first, 1, labels)
            target = self.jump(self.inner, x_u, u, self.end(images), labels)
        loss = self.distance(estimate, target).mean()
        return Losses({"loss": loss, "distillation": loss}, count * (2 + 3 + 1))


def _noise_like(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, device=generator.device).to(images.device)
