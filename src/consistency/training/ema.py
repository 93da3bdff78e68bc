"""The exponential moving average of a model's weights."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from consistency.nets.denoiser import Denoiser


class Ema:
    """A frozen copy of a model whose weights follow it: w_ema <- rate w_ema + (1 - rate) w.

    rate: a number in [0, 1), or a function of the step (from 1). constant: the rate if it is a number. There is no
    warm-up: the copy starts as the model itself.
    """

    def __init__(self, model: Denoiser, rate: float | Callable[[int], float]) -> None:
        self.constant: float | None = None if callable(rate) else rate
        self.rate: Callable[[int], float] = rate if callable(rate) else lambda step: rate
        self.model: Denoiser = copy.deepcopy(model).eval().requires_grad_(False)
        self._source: list[Tensor] = list(model.parameters())
        self._average: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model after that step."""
        torch._foreach_lerp_(self._average, self._source, 1 - self.rate(step))


def half_life_rate(batch: int, images_seen: int, half_life: float, ramp_up: float) -> float:
    """EDM's rate: 0.5^(batch / half-life), the half-life in images and at most ramp_up times the images seen."""
    return 0.5 ** (batch / max(min(half_life, images_seen * ramp_up), 1e-8))
