"""The exponential moving average of a model's weights."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from consistency.nets.denoiser import Denoiser


class Ema:
    """A frozen copy of a model whose weights follow it: w_ema <- rate w_ema + (1 - rate) w.

    rate: a number in [0, 1), or a function of the step (from 1). constant: the rate if it is a number. The copy starts
    as the model itself. warm_up: None, or the exponent of `warmed_up`, with which a number is only the rate's limit;
    without it the first weights keep a share of rate^step, which matters when there is no teacher to start from.
    """

    def __init__(self, model: Denoiser, rate: float | Callable[[int], float], warm_up: float | None = None) -> None:
        self.constant: float | None = None if callable(rate) else rate
        self.rate: Callable[[int], float]
        if callable(rate):
            self.rate = rate
        elif warm_up is None:
            self.rate = lambda step: rate
        else:
            self.rate = lambda step: warmed_up(rate, step, warm_up)
        self.model: Denoiser = copy.deepcopy(model).eval().requires_grad_(False)
        self._source: list[Tensor] = list(model.parameters())
        self._average: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the copy after that step of the model."""
        torch._foreach_lerp_(self._average, self._source, 1 - self.rate(step))


def half_life_rate(batch: int, images_seen: int, half_life: float, ramp_up: float) -> float:
    """Return EDM's rate: 0.5^(batch / half-life), the half-life in images and at most ramp_up times the images seen."""
    return 0.5 ** (batch / max(min(half_life, images_seen * ramp_up), 1e-8))


def warmed_up(rate: float, step: int, exponent: float = 2 / 3) -> float:
    """Return min(rate, 1 - step^-exponent): 0 at step 1, so that the first weights leave no trace.

    The average then reaches back over about step^exponent steps, until the rate is reached: after 1.0e6 steps for
    0.9999 and the exponent 2/3, the default of the library that the released GC code averages with; 3/4 suits shorter
    trainings, 1 is the plain mean of all weights so far.
    """
    return min(rate, 1 - step**-exponent)
