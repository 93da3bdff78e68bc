"""Samplers from a consistency function: deterministic jumps and gamma-sampling."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from consistency.theory.solver import expand


def multistep(
    jump: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    gamma: float = 0.0,
    fresh: Callable[[], Tensor] | None = None,
) -> Tensor:
    """len(times) - 1 jumps along descending times, from x = x_T to the last time.

    jump(x [N, ...], t [N], s [N]) is the consistency function. gamma = 0 jumps straight from time to time; otherwise a
    jump goes to s = sqrt(1 - gamma^2) (t_next - eps) + eps and noise from fresh() brings it back up to t_next, with
    eps the last time. gamma = 1 is the multistep sampler of consistency models. Kim et al. 2024 (CTM), algorithm 3.
    """
    last = times[-1]
    for t, u in itertools.pairwise(times):
        s = u if gamma == 0 else (1 - gamma**2) ** 0.5 * (u - last) + last
        x = jump(x, t.expand(len(x)), s.expand(len(x)))
        if gamma and fresh is not None and bool(s < u):
            x = x + expand(torch.sqrt(u**2 - s**2)[None], x) * fresh().to(x)
    return x
