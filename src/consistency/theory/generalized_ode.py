"""The generalised ODE of Analytic-Precond: from l_t, s_t to the coefficients f(t,s), g(t,s).

With lambda = -ln t, log L = int l, log S = int s and eta = int L S (AP (11)-(12)), one Euler step in eta gives
f and g in forward or backward form. Everything is kept as log L, log S and
    Q(lambda) = Q(lambda_T) e^{M_T - M} + int e^{M' - M} dlambda',  M = log L + log S,
so that q(t,s) = int e^{M - M_s} dlambda = Q_s - e^{M_t - M_s} Q_t needs no large number. float64 throughout.
"""

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

# Cubic splines through the fitted times: with 40 of them f and g err as little as with 120 joined by lines.
_PARTS = 8
_TINY = 1e-300
# Between the finer nodes l and s are linear, so M is quadratic and 8 Gauss-Legendre points are exact to rounding.
_POINTS, _WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(8))


class GeneralizedODE:
    """l_t and s_t at times, splines in lambda between them, and the families of coefficients they give.

    times: [N] > 0, strictly monotone; l, s: [N], finite; centre: the mean image [C, H, W], if the ODE is that of
    x - centre. Evaluates any sigma_min <= s <= t <= sigma_max between
    the outermost nodes, on the device given. Raises ValueError for nodes that are not usable and for times
    outside them.
    """

    def __init__(
        self,
        times: Tensor,
        l: Tensor,
        s: Tensor,
        device: torch.device | str = "cpu",
        centre: Tensor | None = None,
    ) -> None:
        times, l, s = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (times, l, s))
        order = torch.argsort(times, descending=True)
        times, l, s = times[order], l[order], s[order]
        if len(times) < 2 or not bool((times > 0).all()) or not bool((times[:-1] > times[1:]).all()):
            raise ValueError("the fit's times must be at least two different positive numbers")
        if not bool(torch.isfinite(l).all() and torch.isfinite(s).all()):
            raise ValueError("l_t and s_t must be finite at every time")
        self.times = times
        self.sigma_max, self.sigma_min = times[0].item(), times[-1].item()
        lam, l, s = _refined(-torch.log(times), l, s)
        width = torch.diff(lam)
        log_L, log_S = _cumulative(l, width), _cumulative(s, width)
        nodes = {
            "lam": lam[:-1],
            "l": l[:-1],
            "l_slope": torch.diff(l) / width,
            "s": s[:-1],
            "s_slope": torch.diff(s) / width,
            "log_L": log_L[:-1],
            "log_S": log_S[:-1],
            # On the nodes' device, so that no step copies them there again.
            "points": _POINTS,
            "weights": _WEIGHTS,
        }
        self._nodes = nodes
        # Q e^M is a sum over the intervals before; Q(lambda_T), which cancels in q, is 1.
        M = log_L + log_S
        terms = torch.cat([M[:1], M[1:] + self._log_local(torch.arange(len(width)), width)])
        nodes["log_Q"] = (torch.logcumsumexp(terms, 0) - M)[:-1]
        self._nodes = {name: value.to(device) for name, value in nodes.items()}
        self.centre = None if centre is None else centre.to(device)

    def is_regular(self) -> bool:
        """Tell whether every jump from node to node has finite coefficients, and g >= 0, in both forms."""
        first, second = torch.triu_indices(len(self.times), len(self.times))
        pairs = [form(self.times[first], self.times[second]) for form in (self.backward, self.forward)]
        return all(bool(torch.isfinite(f).all() and torch.isfinite(g).all() and (g >= 0).all()) for f, g in pairs)

    def backward(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """f(t,s), g(t,s) of the backward Euler step, the form the paper trains with. t >= s, same shape."""
        return self.step(t, s, theta=1.0)

    def forward(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """f(t,s), g(t,s) of the forward Euler step, AP (14). t >= s, same shape."""
        return self.step(t, s, theta=0.0)

    def step(self, t: Tensor, s: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        """f(t,s), g(t,s) of one step with h at both ends: weight theta, 0 to 1, at s, the rest at t (ours). t >= s.

        With r = q / (theta + (1 - theta) S_t / S_s),
            f = [L_t / L_s - (1 - theta) (1 - l_t) r] / [1 + theta (1 - l_s) r],   g = r / [1 + theta (1 - l_s) r].
        Where D is the same at both ends the step is the exact one to second order for theta = 1/2.
        """
        here, there = self._state(t), self._state(s)
        share = theta + (1 - theta) * torch.exp((here["log_S"] - there["log_S"]).clamp(max=700))
        r = _q(here, there) / share
        damping = theta * (1 - there["l"])
        # 1 / (1/r + damping) is r / (1 + damping r) without inf/inf for a huge r.
        g = 1 / (1 / r + damping)
        f = torch.exp(here["log_L"] - there["log_L"] - torch.log1p(damping * r)) - (1 - theta) * (1 - here["l"]) * g
        return _boundary(t, s, f, g)

    def shortfall(self, times: Tensor) -> float:
        """Return how far the backward form's g is below ctm's 1 - s/t, at most, over the jumps between neighbouring
        times [n + 1], descending: a share of ctm's, 0 if g is nowhere below."""
        t, s = times[:-1], times[1:]
        return max(0.0, float((1 - self.backward(t, s)[1] / (1 - s / t)).max()))

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the node at or above each time (index) and the offset from it in lambda."""
        t = torch.as_tensor(t, dtype=torch.float64)
        slack = 1e-6  # times that went through float32 may miss the end nodes by rounding
        low, high = self.sigma_min * (1 - slack), self.sigma_max * (1 + slack)
        # Reading a GPU tensor back would stall the training step, so only CPU times are checked here.
        if t.device.type == "cpu" and not bool(((t >= low) & (t <= high)).all()):
            raise ValueError(
                f"times must lie in [{self.sigma_min:g}, {self.sigma_max:g}], where the coefficients were fitted; "
                f"got {t.min().item():g} to {t.max().item():g}"
            )
        lam = -torch.log(t.clamp(self.sigma_min, self.sigma_max))
        start = self._nodes["lam"]
        cell = (torch.searchsorted(start, lam.contiguous(), right=True) - 1).clamp(0, len(start) - 1)
        return cell, lam - start[cell]

    def _state(self, t: Tensor) -> dict[str, Tensor]:
        """Return l, log L, log S and log Q at times t."""
        cell, offset = self._locate(t)
        nodes = self._nodes
        return {
            "l": nodes["l"][cell] + nodes["l_slope"][cell] * offset,
            "log_L": _along(nodes["log_L"], nodes["l"], nodes["l_slope"], cell, offset),
            "log_S": _along(nodes["log_S"], nodes["s"], nodes["s_slope"], cell, offset),
            "log_Q": self._log_Q(cell, offset),
        }

    def _log_Q(self, cell: Tensor, offset: Tensor) -> Tensor:
        """Return log Q at an offset from a node: the node's value, damped, plus the integral over the offset."""
        nodes = self._nodes
        rate, curve = (nodes["l"] + nodes["s"])[cell], (nodes["l_slope"] + nodes["s_slope"])[cell]
        carried = nodes["log_Q"][cell] - (rate * offset + 0.5 * curve * offset**2)
        return torch.logaddexp(carried, self._log_local(cell, offset))

    def _log_local(self, cell: Tensor, offset: Tensor) -> Tensor:
        """Return the logarithm of int e^{M' - M} dlambda' from a node to an offset from it, where M is."""
        nodes = self._nodes
        rate = (nodes["l"] + nodes["s"])[cell].unsqueeze(-1)
        curve = (nodes["l_slope"] + nodes["s_slope"])[cell].unsqueeze(-1)
        reach = offset.unsqueeze(-1)
        u = 0.5 * reach * (nodes["points"] + 1)
        to_end = rate * (u - reach) + 0.5 * curve * (u**2 - reach**2)  # M(u) - M(end)
        # The smallest of offsets: at a node the logarithm of 0 has no derivative, but that of Q does.
        return torch.log(0.5 * (offset + _TINY) * (nodes["weights"] * torch.exp(to_end)).sum(-1))


def _refined(lam: Tensor, *values: Tensor) -> list[Tensor]:
    """Divide each interval of lam [N] into parts; return the finer lam and cubic splines of the values on it."""
    whole = torch.arange(_PARTS * (len(lam) - 1) + 1, dtype=torch.float64) / _PARTS
    fine = np.interp(whole, np.arange(len(lam)), lam)
    return [torch.from_numpy(fine), *(torch.from_numpy(CubicSpline(lam, value)(fine)) for value in values)]


def _cumulative(values: Tensor, width: Tensor) -> Tensor:
    """Integral from the first node of a function linear between nodes (the trapezoid rule is exact)."""
    steps = 0.5 * (values[1:] + values[:-1]) * width
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(steps, 0)])


def _along(start: Tensor, rate: Tensor, slope: Tensor, cell: Tensor, offset: Tensor) -> Tensor:
    return start[cell] + rate[cell] * offset + 0.5 * slope[cell] * offset**2


def _q(here: dict[str, Tensor], there: dict[str, Tensor]) -> Tensor:
    """q = int_{lambda_t}^{lambda_s} exp(M - M_s) dlambda >= 0."""
    decay = here["log_L"] + here["log_S"] - there["log_L"] - there["log_S"]
    ratio = (decay + here["log_Q"] - there["log_Q"]).clamp(max=0)
    return -torch.exp(there["log_Q"]) * torch.expm1(ratio)


def _boundary(t: Tensor, s: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Set f(t,t) = 1 and g(t,t) = 0 exactly, whatever the rounding of vectorised exponentials."""
    same = t == s
    return torch.where(same, torch.ones_like(f), f), torch.where(same, torch.zeros_like(g), g)
