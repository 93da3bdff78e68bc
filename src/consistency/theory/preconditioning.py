"""Preconditionings of the consistency function f_theta(x,t,s) = f(t,s) x + g(t,s) D_theta(x,t,s).

A centred one (ours) is that of x - mu and D_theta - mu, with the mean image mu of the training data: it adds
(1 - f - g) mu. Every preconditioning satisfies the boundary condition f(t,t) = 1, g(t,t) = 0 exactly. All coefficients
are computed in float64 from times eps <= s <= t <= T of shape [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

if TYPE_CHECKING:  # study files are read without torch, whose import takes seconds
    from torch import Tensor

    from consistency.theory.generalized_ode import GeneralizedODE

    Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class StudentDenoiser(Protocol):
    """Interface of the network in a consistency function."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """D_theta(x, t, s)."""

    def raw(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """F_theta(x, t, s), the network without its skip connection."""


@dataclass(frozen=True)
class Preconditioning:
    """Coefficients f(t,s), g(t,s), and the function that g multiplies: the denoiser D or its bare network F. centre:
    the mean image [C, H, W] of a centred one."""

    name: str
    acts_on: Literal["D", "F"]
    coefficients: Coefficients
    centre: Tensor | None = None

    def jump(self, student: StudentDenoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """The consistency function f_theta(x, t, s): x [N, ...] at times t [N] to times s [N]."""
        from consistency.theory.solver import expand

        f, g = self.coefficients(t.double(), s.double())
        network = student(x, t, s, labels) if self.acts_on == "D" else student.raw(x, t, s, labels)
        jumped = expand(f, x) * x + expand(g, x) * network
        return jumped if self.centre is None else jumped + expand(1 - f - g, x) * self.centre


def ctm(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """CTM's coefficients s/t, 1 - s/t, an Euler step of the PF-ODE. Act on D."""
    return s / t, 1 - s / t


def bcm(t: Tensor, s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """BCM's coefficients. Act on F; with EDM's scalings the same function of (x, F) as ctm."""
    variance = sigma_data**2 + t * t
    return (sigma_data**2 + t * s) / variance, sigma_data * (t - s) / variance.sqrt()


def cm(t: Tensor, s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """CM's coefficients (there with s = eps). Act on F."""
    gap = t - s
    return sigma_data**2 / (sigma_data**2 + gap * gap), sigma_data * gap / (sigma_data**2 + t * t).sqrt()


@dataclass(frozen=True)
class Form:
    """An entry of FORMS. coefficients: f and g of a form that needs sigma_data alone; theta: of a form made from the
    fitted l_t and s_t, the weight of h at s (None: the student's key `theta`); centred: of x - mu and D - mu; ours: in
    no paper; only_to_eps: defined for s = eps alone."""

    acts_on: Literal["D", "F"] = "D"
    coefficients: Callable[[float], Coefficients] | None = None
    theta: float | None = None
    centred: bool = False
    ours: bool = False
    only_to_eps: bool = False

    @property
    def fitted(self) -> bool:
        """True if f and g are made from the fitted l_t and s_t."""
        return self.coefficients is None

    def weight(self, theta: float) -> float:
        """Return the weight of h at s, for a student with that `theta`."""
        return theta if self.theta is None else self.theta


#: preconditionings by their names in a study
FORMS: dict[str, Form] = {
    "cm": Form("F", lambda sigma_data: lambda t, s: cm(t, s, sigma_data), only_to_eps=True),
    "bcm": Form("F", lambda sigma_data: lambda t, s: bcm(t, s, sigma_data)),
    "ctm": Form("D", lambda _: ctm),
    "analytic": Form(theta=1.0),
    "analytic-forward": Form(theta=0.0),
    "analytic-midpoint": Form(ours=True),
    "analytic-centred": Form(theta=1.0, centred=True, ours=True),
    "analytic-forward-centred": Form(theta=0.0, centred=True, ours=True),
    "analytic-midpoint-centred": Form(centred=True, ours=True),
}


def build_preconditioning(
    name: str,
    sigma_data: float,
    ode: GeneralizedODE | Callable[[], GeneralizedODE] | None = None,
    theta: float = 0.5,
) -> Preconditioning:
    """Return the preconditioning of that name. ode: of the fitted coefficients, or a function that returns it; theta:
    of a midpoint form, 0 to 1.

    Raises ValueError for an unknown name, a fitted form without coefficients or a centred one without a mean image.
    """
    form = FORMS.get(name)
    if form is None or (form.fitted and ode is None):
        unfitted = ", ".join(known for known, each in FORMS.items() if not each.fitted)
        raise ValueError(f"no preconditioning {name!r}: without fitted coefficients there are {unfitted}")
    if form.coefficients is not None:
        return Preconditioning(name, form.acts_on, form.coefficients(sigma_data))
    current = ode if callable(ode) else lambda: cast("GeneralizedODE", ode)
    centre = current().centre if form.centred else None
    if form.centred and centre is None:
        raise ValueError(f"{name} needs a fit around the mean image, and this one has none: fit it again")
    weight = form.weight(theta)
    return Preconditioning(name, form.acts_on, lambda t, s: current().step(t, s, weight), centre)
