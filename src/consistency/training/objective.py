"""Interface of a loss, and the parts that several losses share.

An objective first draws the randomness of a whole optimiser step, then gives the terms of any part of the batch. The
step is therefore the same in any number of parts and on any number of devices (without dropout, whose masks belong to
the part). Evaluations count a forward pass as 1 per image and a backward pass as 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from consistency.config.dataset import Noise
from consistency.nets.denoiser import Denoiser
from consistency.theory.distance import Distance
from consistency.theory.noise import edm_weight
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.solver import DenoiserFn, expand
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


@dataclass(frozen=True)
class Models:
    """Networks of a student's training. predictor makes gc's endpoints: the EMA's, or those of an earlier student."""

    student: Denoiser
    ema: Denoiser
    teacher: Denoiser
    predictor: Denoiser


@dataclass(frozen=True)
class Basis:
    """The parts of a student's loss that do not depend on its objective."""

    models: Models
    preconditioning: Preconditioning
    distance: Distance
    noise: Noise
    device: torch.device
    stopwatch: Stopwatch


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


def normal(shape: Shape, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise, float32, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)
