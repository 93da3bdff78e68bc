"""The exponential moving average of a model's weights."""

import copy

import torch
from torch import Tensor

from consistency.nets.denoiser import Denoiser


class Ema:
    """A frozen copy of a model whose weights follow it: w_ema <- rate w_ema + (1 - rate) w.

    There is no warm-up: the copy starts as the model itself.
    """

    def __init__(self, model: Denoiser) -> None:
        self.model: Denoiser = copy.deepcopy(model).eval().requires_grad_(False)
        self._source: list[Tensor] = list(model.parameters())
        self._average: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """One step with the given rate in [0, 1)."""
        torch._foreach_lerp_(self._average, self._source, 1 - rate)


def half_life_rate(batch: int, images_seen: int, half_life: float, ramp_up: float) -> float:
    """EDM's rate: 0.5^(batch / half-life), the half-life in images and at most ramp_up times the images seen."""
    return 0.5 ** (batch / max(min(half_life, images_seen * ramp_up), 1e-8))
