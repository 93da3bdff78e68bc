"""Preconditionings of the consistency function f_theta(x,t,s) = f(t,s) x + g(t,s) D_theta(x,t,s).

Every preconditioning satisfies the boundary condition f(t,t) = 1, g(t,t) = 0 exactly. All coefficients are
computed in float64 from times eps <= s <= t <= T of shape [N].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.solver import expand

Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class StudentDenoiser(Protocol):
    """Interface of the network in a consistency function."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """D_theta(x, t, s)."""

    def raw(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """F_theta(x, t, s), the network without its skip connection."""


@dataclass(frozen=True)
class Preconditioning:
    """Coefficients f(t,s), g(t,s), and the function that g multiplies: the denoiser D or its bare network F."""

    name: str
    acts_on: Literal["D", "F"]
    coefficients: Coefficients

    def jump(self, student: StudentDenoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """The consistency function f_theta(x, t, s): x [N, ...] at times t [N] to times s [N]."""
        f, g = self.coefficients(t.double(), s.double())
        network = student(x, t, s, labels) if self.acts_on == "D" else student.raw(x, t, s, labels)
        return expand(f, x) * x + expand(g, x) * network


def ctm(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """CTM's coefficients s/t, 1 - s/t, an Euler step of the PF-ODE. Act on D."""
    return s / t, 1 - s / t


def bcm(t: Tensor, s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """BCM's coefficients. Act on F; with EDM's scalings the same function of (x, F) as ctm."""
    variance = sigma_data**2 + t * t
    return (sigma_data**2 + t * s) / variance, sigma_data * (t - s) / torch.sqrt(variance)


def cm(t: Tensor, s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """CM's coefficients (there with s = eps). Act on F."""
    gap = t - s
    return (
        sigma_data**2 / (sigma_data**2 + gap * gap),
        sigma_data * gap / torch.sqrt(sigma_data**2 + t * t),
    )


def build_preconditioning(
    name: str, sigma_data: float, generalized_ode: GeneralizedODE | None = None
) -> Preconditioning:
    """Return the preconditioning of that name; the analytic ones read their coefficients from generalized_ode.

    Raises ValueError for an unknown name, or an analytic one without fitted coefficients.
    """
    table: dict[str, tuple[Literal["D", "F"], Coefficients]] = {
        "ctm": ("D", ctm),
        "bcm": ("F", lambda t, s: bcm(t, s, sigma_data)),
        "cm": ("F", lambda t, s: cm(t, s, sigma_data)),
    }
    if generalized_ode is not None:
        table |= {"analytic": ("D", generalized_ode.backward), "analytic-forward": ("D", generalized_ode.forward)}
    if name not in table:
        raise ValueError(f"no preconditioning {name!r}: without fitted coefficients there are ctm, bcm and cm")
    return Preconditioning(name, *table[name])
