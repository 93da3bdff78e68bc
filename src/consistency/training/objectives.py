"""The losses: EDM's for the teacher, trajectory (CTM) and endpoint (CM) distillation for students.

An objective first draws the randomness of a whole optimiser step, then gives the terms of any part of the batch. The
step is therefore the same in any number of parts and on any number of devices (without dropout, whose masks belong to
the part). Evaluations count a forward pass as 1 per image and a backward pass as 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from consistency.nets.denoiser import Denoiser
from consistency.theory.distance import Distance
from consistency.theory.noise import ctm_dsm_sigma, edm_weight, lognormal_sigma
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.solver import DenoiserFn, expand, heun_step
from consistency.training.stopwatch import Stopwatch

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Term:
    """One term of a loss. value: scalar with gradients, a mean over images; weight: its factor in the loss;
    evaluations: forward-pass equivalents made, backward pass included."""

    name: str
    value: Tensor
    weight: float
    evaluations: int


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step; every tensor has one row per image of the batch."""

    def part(self, rows: slice) -> Self:
        """Return the draws of some images."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[rows] for name, value in tensors.items() if isinstance(value, Tensor)})


class Objective(Protocol):
    """Interface that the training expects of a loss."""

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> Any:
        """Draw the randomness of a step (from 0) for a batch of that shape. Only numbers that Python needs come from
        the host's generator: reading one back from a GPU would stall it."""

    def terms(self, images: Tensor, labels: Tensor | None, draws: Any) -> Iterator[Term]:
        """Yield the terms one by one, so that each may be differentiated before the next is computed. images: float [N,
        C, H, W] in [-1, 1]; labels: int64 [N] or None; draws: of those images."""


@runtime_checkable
class WholeBatch(Protocol):
    """An objective whose draws also depend on the images of the whole batch, over all processes."""

    def pair(self, images: Tensor, labels: Tensor | None, draws: Any) -> Any:
        """Return the draws of the batch, given all its images [N, C, H, W] and labels [N]."""


def with_labels(denoiser: Denoiser, labels: Tensor | None) -> DenoiserFn:
    """Return the denoiser D(x, t) of images with those labels."""
    return lambda x, t: denoiser(x, t, labels=labels)


def weighted_denoising_error(
    denoise: Callable[[Tensor, Tensor], Tensor], images: Tensor, sigma: Tensor, sigma_data: float, z: Tensor
) -> Tensor:
    """Return the mean of (sigma^2 + sd^2)/(sigma sd)^2 ||D(x_0 + sigma z, sigma) - x_0||^2 over images and pixels."""
    error = denoise(images + expand(sigma, images) * z, sigma) - images
    return (expand(edm_weight(sigma, sigma_data), images) * error.square()).mean()


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


@dataclass(frozen=True)
class Distillation:
    """Base of both distillations. grid: descending float64 times [N] from sigma_max to sigma_min."""

    student: Denoiser
    average: Denoiser
    teacher: Denoiser
    preconditioning: Preconditioning
    distance: Distance
    grid: Tensor
    target: str
    stopwatch: Stopwatch = field(default_factory=Stopwatch, kw_only=True)

    @property
    def inner(self) -> Denoiser:
        """Network of the target's inner jump."""
        return self.average if self.target == "ema" else self.student

    def jump(self, model: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """Return f_theta(x, t, s) of the given weights."""
        return self.preconditioning.jump(model, x, t, s, labels)

    @torch.no_grad()
    def teacher_steps(self, x: Tensor, first: Tensor, steps: int, labels: Tensor | None) -> Tensor:
        """Take that many Heun steps from x along the grid, from node first [N] on, the whole batch at once."""
        denoiser = with_labels(self.teacher, labels)
        with self.stopwatch.part("teacher"):
            for k in range(steps):
                x = heun_step(denoiser, x, self.grid[first + k], self.grid[first + k + 1])
        return x

    @cached_property
    def ends(self) -> tuple[float, float]:
        """eps and T, read from the grid's device once."""
        return self.grid[-1].item(), self.grid[0].item()

    def end(self, like: Tensor) -> Tensor:
        """Return eps for every image of a batch."""
        return self.grid[-1].expand(len(like))


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
        """Compare both sides at the end of the trajectory, after a jump with the frozen average."""
        t, u, s = self.grid[draws.first], self.grid[draws.first + draws.steps], self.grid[draws.to]
        x_t = images + expand(t, images) * draws.z
        estimate = self.jump(self.student, x_t, t, s, labels)
        estimate = self.jump(self.average, estimate, s, self.end(images), labels)
        with torch.no_grad():
            x_u = self.teacher_steps(x_t, draws.first, draws.steps, labels)
            target = self.jump(self.inner, x_u, u, s, labels)
            target = self.jump(self.average, target, s, self.end(images), labels)
        return self.distance(estimate, target).mean()

    def denoising(self, images: Tensor, labels: Tensor | None, sigma: Tensor, z: Tensor) -> Tensor:
        """Return the DSM term: the student's D_theta(x_t, t, t) against x_0, with noise of its own."""
        sigma_data = self.student.sigma_data
        return weighted_denoising_error(lambda x, t: self.student(x, t, t, labels), images, sigma, sigma_data, z)


@dataclass(frozen=True)
class Pairs(Draws):
    """Draws of `Endpoint`. first [N]: the node of t; z: noise of x_t."""

    first: Tensor
    z: Tensor


@dataclass(frozen=True)
class Endpoint(Distillation):
    """Endpoint distillation, AP (5): neighbouring grid times t > u, both jumps to eps."""

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> Pairs:
        """Draw a uniform node for every image."""
        first = torch.randint(len(self.grid) - 1, shape[:1], generator=device, device=device.device)
        return Pairs(first, normal(shape, device))

    def terms(self, images: Tensor, labels: Tensor | None, draws: Pairs) -> Iterator[Term]:
        """Yield the distance at eps of two sides that start one teacher step apart."""
        t, u = self.grid[draws.first], self.grid[draws.first + 1]
        x_t = images + expand(t, images) * draws.z
        estimate = self.jump(self.student, x_t, t, self.end(images), labels)
        with torch.no_grad():
            x_u = self.teacher_steps(x_t, draws.first, 1, labels)
            target = self.jump(self.inner, x_u, u, self.end(images), labels)
        yield Term("distillation", self.distance(estimate, target).mean(), 1.0, (2 + 3 + 1) * len(images))


def normal(shape: Shape, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise, float32, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)
