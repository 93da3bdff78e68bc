"""Levels of consistency training: the two times t > u at which an image is compared, and the comparison's weight.

The papers count levels upwards (sigma_i < sigma_{i+1}); here t is the upper level, as in distillation, u the lower.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from consistency.theory.noise import lognormal_sigma, rho_grid


class Levels(NamedTuple):
    """t and u, each float64 [N] with sigma_min <= u <= t <= sigma_max, and the weight of their comparison [N]."""

    t: Tensor
    u: Tensor
    weight: Tensor


class Schedule(Protocol):
    """A rule for the levels as a function of the training step."""

    def levels(self, step: int, count: int, generator: torch.Generator) -> Levels:
        """Draw the levels of count images at a step (from 0), on the generator's device."""

    def stage(self, step: int) -> int:
        """Return a number that changes whenever the rule changes during training."""


def doubling_nodes(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """Return the number of nodes at a step out of so many (from 0): min(first 2^floor(step / K'), last) + 1.

    K' = floor(steps / (log2 floor(last / first) + 1)), at least 1: eight stages from 11 to 1281 nodes by default.
    Song and Dhariwal 2024 (iCT), table 1.
    """
    stage = max(1, math.floor(steps / (math.log2(last // first) + 1)))
    # The exponent is bounded before the power: a training may go on long after the last doubling.
    doublings = min(step // stage, math.ceil(math.log2(last / first)))
    return min(first * 2**doublings, last) + 1


def level_probabilities(grid: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Return the probability of each pair of neighbours of a descending grid [N]: the mass of ln sigma ~ N(mean, std^2)
    between them, as differences of erf, normalised. float64 [N-1]. iCT, section 3.4."""
    reach = torch.erf((torch.log(grid.double()) - mean) / (math.sqrt(2) * std))
    mass = reach[:-1] - reach[1:]
    return mass / mass.sum()


@dataclass(frozen=True)
class DoublingCurriculum:
    """iCT: neighbours of a rho grid whose intervals double during training; weight 1 / (t - u).

    steps: of the whole training; first, last: intervals of the first and the last grid; mean, std: of ln sigma.
    """

    steps: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    first: int = 10
    last: int = 1280
    mean: float = -1.1
    std: float = 2.0

    def stage(self, step: int) -> int:
        """Return the number of nodes of the grid."""
        return doubling_nodes(step, self.steps, self.first, self.last)

    def levels(self, step: int, count: int, generator: torch.Generator) -> Levels:
        """Draw a pair with `level_probabilities` for each image."""
        shape = (self.stage(step), self.sigma_min, self.sigma_max, self.rho)
        grid, probabilities = _grid(shape, (self.mean, self.std), generator.device)
        upper = torch.multinomial(probabilities, count, replacement=True, generator=generator)
        t, u = grid[upper], grid[upper + 1]
        return Levels(t, u, 1 / (t - u))


@cache
def _grid(
    shape: tuple[int, float, float, float], normal: tuple[float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return a grid and the probabilities of its pairs, cached per stage to save a copy to the device in every step."""
    grid = rho_grid(*shape)
    return grid.to(device), level_probabilities(grid, *normal).to(device)


def shrink(t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Return ECT's r / t = max(0, 1 - q^-(stage+1) (1 + k sigmoid(-b t))), in [0, 1); 0: the target is the data.

    Geng et al. 2024 (ECT), the sigmoid mapping; q, k, b of its CIFAR-10 runs.
    """
    return (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1)).clamp(min=0)


@dataclass(frozen=True)
class ShrinkingCurriculum:
    """ECT: ln t ~ N(mean, std^2), and r that approaches t during training; weight 1 / (t - r).

    double_every: steps per stage (released runs: 25,000). Times below sigma_min do not exist here, so u = max(r,
    sigma_min): where ECT's target is the data, ours is the data at noise level sigma_min. t is clamped to
    [sigma_min, sigma_max]; at t = sigma_min both sides are equal by the boundary condition.
    """

    double_every: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    mean: float = -1.1
    std: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0

    def stage(self, step: int) -> int:
        """Return the number of times that r / t has moved towards 1."""
        return step // self.double_every

    def levels(self, step: int, count: int, generator: torch.Generator) -> Levels:
        """Draw new levels for each image."""
        t = lognormal_sigma(count, self.mean, self.std, generator).double().clamp(self.sigma_min, self.sigma_max)
        r = t * shrink(t, self.stage(step), self.q, self.k, self.b)
        return Levels(t, r.clamp(min=self.sigma_min), 1 / (t - r))
