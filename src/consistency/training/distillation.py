"""The common part of trajectory and endpoint distillation: the networks, the grid, the teacher's steps."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from consistency.config import objectives
from consistency.nets.denoiser import Denoiser
from consistency.theory.distance import Distance
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.solver import heun_step
from consistency.training.fits import time_grid
from consistency.training.objective import Basis, with_labels
from consistency.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class Distillation:
    """Base of both distillations. grid: descending float64 times [N] from sigma_max to sigma_min."""

    student: Denoiser
    ema: Denoiser
    teacher: Denoiser
    preconditioning: Preconditioning
    distance: Distance
    grid: Tensor
    target: str
    stopwatch: Stopwatch = field(default_factory=Stopwatch, kw_only=True)

    @classmethod
    def _build(cls, settings: objectives.Distillation, basis: Basis, **own: Any) -> Self:
        """Build the loss with these settings. own: the subclass's fields."""
        return cls(
            basis.models.student,
            basis.models.ema,
            basis.models.teacher,
            basis.preconditioning,
            basis.distance,
            time_grid(basis.noise, settings.nodes, basis.device),
            settings.target,
            stopwatch=basis.stopwatch,
            **own,
        )

    @property
    def inner(self) -> Denoiser:
        """Network of the target's inner jump."""
        return self.ema if self.target == "ema" else self.student

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
