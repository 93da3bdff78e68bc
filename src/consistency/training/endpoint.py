"""Endpoint distillation, AP (5): neighbouring times, both jumps to eps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from consistency.config import objectives
from consistency.theory.solver import expand
from consistency.training.distillation import Distillation
from consistency.training.objective import Basis, Draws, Shape, Term, normal


@dataclass(frozen=True)
class Pairs(Draws):
    """Draws of `Endpoint`. first [N]: the node of t; z: noise of x_t."""

    first: Tensor
    z: Tensor


@dataclass(frozen=True)
class Endpoint(Distillation):
    """Endpoint distillation, AP (5): neighbouring grid times t > u, both jumps to eps."""

    @classmethod
    def build(cls, settings: objectives.Endpoint, basis: Basis) -> Self:
        """Build the loss of a student."""
        return cls._build(settings, basis)

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
