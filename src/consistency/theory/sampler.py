"""Samplers: jumps and gamma-sampling of a consistency function, EDM's stochastic sampler of a denoiser.

Their times are numbers, not tensors, so that a sampler never waits for a GPU's queue.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from consistency.theory.solver import DenoiserFn, every, heun_solve

# The next standard normal noise of every image, on the device of the samples.
Fresh = Callable[[], Tensor]


def multistep(
    jump: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    times: Sequence[float],
    gamma: float = 0.0,
    fresh: Fresh | None = None,
) -> Tensor:
    """Make len(times) - 1 jumps along descending times, from x = x_T to the last time.

    jump(x [N, ...], t [N], s [N]) is the consistency function. gamma = 0 jumps straight from time to time; otherwise a
    jump goes to s = sqrt(1 - gamma^2) (t_next - eps) + eps and noise from fresh() brings it back up to t_next, with
    eps the last time. gamma = 1 is the multistep sampler of consistency models. Kim et al. 2024 (CTM), algorithm 3.
    """
    last = times[-1]
    for t, u in itertools.pairwise(times):
        s = u if gamma == 0 else (1 - gamma**2) ** 0.5 * (u - last) + last
        x = jump(x, every(t, x), every(s, x))
        if gamma and fresh is not None and s < u:
            x = x + math.sqrt(u * u - s * s) * fresh().to(x)
    return x


@dataclass(frozen=True)
class Churn:
    """Noise of EDM's stochastic sampler: S_churn in all, added while S_min <= t <= S_max, with deviation S_noise."""

    amount: float
    t_min: float
    t_max: float
    deviation: float

    def raised(self, t: float, steps: int) -> float:
        """Return the time t (1 + gamma) to which noise is added before the step from t, of so many steps."""
        gamma = min(self.amount / steps, math.sqrt(2) - 1) if self.t_min <= t <= self.t_max else 0.0
        return t * (1 + gamma)


def stochastic_heun(denoiser: DenoiserFn, x: Tensor, times: Sequence[float], churn: Churn, fresh: Fresh) -> Tensor:
    """Integrate by Heun's method with noise added before its steps, from x at times[0] to times[-1]; a last time of 0
    is reached by an Euler step.

    x: [N, ...], the result has its precision; fresh() is called only where noise is added. Without any it is
    heun_solve. Karras et al. 2022, algorithm 2.
    """
    for t, u in itertools.pairwise(times):
        raised = churn.raised(t, len(times) - 1)
        if raised > t:
            x = x + churn.deviation * math.sqrt(raised * raised - t * t) * fresh().to(x)
        x = heun_solve(denoiser, x, (raised, u))
    return x
