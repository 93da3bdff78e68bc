"""Flow maps in continuous time (ours): a jump is compared with the teacher's ODE by its derivative, without a solver.

With lambda = -ln t, the ODE is dx/dlambda = D_phi(x, t) - x, and G(x, t, s) = f x + g D_theta(x, t, s) is its flow map
if and only if, for every member (f, g) of the family,

    Lagrangian:  dG/dlambda_s + G = D_phi(G, s)                                  by the end s,
    Eulerian:    dG/dlambda_t + dG/dx (D_phi(x, t) - x) = 0                      by the start t, along the ODE,

and G(x, t, t) = x. Both need the derivative of f, g and of the network. For ctm's f and g the second is MeanFlow's
identity. docs/flow-maps.md derives them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.func import jvp

from consistency.config import objectives
from consistency.theory.noise import lognormal_sigma
from consistency.theory.preconditioning import Preconditioning
from consistency.theory.solver import DenoiserFn, expand
from consistency.training.objective import Basis, Draws, Shape, Term, normal, with_labels

# A network with the times and labels bound: (x, t, s) -> D_theta or F_theta.
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Spans(Draws):
    """Draws of `FlowMap`. t >= s [N]; z: noise of x_t; on_diagonal [N]: s = t, on the host; along: weight of the
    student's derivative."""

    t: Tensor
    s: Tensor
    z: Tensor
    on_diagonal: Tensor
    along: float


@dataclass(frozen=True)
class Jump:
    """A jump and its rates. value: G; rate: the derivative of G with that of the network
    left out; tangent: g times the derivative of the network."""

    value: Tensor
    rate: Tensor
    tangent: Tensor


def jump_with_rates(
    form: Preconditioning, network: Network, x: Tensor, t: Tensor, s: Tensor, dx: Tensor | None, dt: Tensor, ds: Tensor
) -> Jump:
    """Return G(x, t, s) and its derivative in the direction (dx, dt, ds); x, dx: [N, ...] (dx None: 0); times [N], s <
    t: at s = t the coefficients have no derivative. One forward-mode product through the network."""
    f, g, f_rate, g_rate = (expand(each, x) for each in _coefficients(form, t, s, dt, ds))
    dx = torch.zeros_like(x) if dx is None else dx
    there = [each.to(x.dtype) for each in (t, s, dt, ds)]
    both: Any = jvp(network, (x, *there[:2]), (dx, *there[2:]))
    denoised, change = both
    value, rate = f * x + g * denoised, f_rate * x + f * dx + g_rate * denoised
    if form.centre is not None:
        value, rate = value + (1 - f - g) * form.centre, rate - (f_rate + g_rate) * form.centre
    return Jump(value, rate, g * change)


def _coefficients(form: Preconditioning, *times: Tensor) -> list[Tensor]:
    """Return f, g and their rates at (t, s) in the direction (dt, ds). Each depends on its own times alone, so that two
    reverse passes give the rates; forward mode takes longer on such short tensors than a small network."""
    t, s, dt, ds = (each.detach().double() for each in times)
    ends = (t.requires_grad_(), s.requires_grad_())
    with torch.enable_grad():
        values = form.coefficients(*ends)
    rates = []
    for value in values:
        by_t, by_s = torch.autograd.grad(
            value.sum(), ends, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        rates.append(by_t * dt + by_s * ds)
    return [*(value.detach() for value in values), *rates]


def lagrangian(
    form: Preconditioning,
    network: Network,
    teacher: DenoiserFn,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    shaped: Callable[[Tensor], Tensor] = lambda tangent: tangent,
) -> tuple[Tensor, Tensor]:
    """Return dG/dlambda_s + G, with gradients, and D_phi(G, s), without: equal for the flow map. shaped: what becomes
    of the network's derivative."""
    jump = jump_with_rates(form, network, x, t, s, None, torch.zeros_like(t), -s)
    with torch.no_grad():
        target = teacher(jump.value.detach(), s)
    return jump.value + jump.rate + shaped(jump.tangent), target


def eulerian(
    form: Preconditioning,
    network: Network,
    teacher: DenoiserFn,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    shaped: Callable[[Tensor], Tensor] = lambda tangent: tangent,
) -> tuple[Tensor, Tensor]:
    """Return G(x, t, s), with gradients, and G + dG/dlambda_t along the teacher's ODE, without: equal for the flow
    map. shaped: what becomes of the network's derivative."""
    with torch.no_grad():
        dx = teacher(x, t) - x
    # One pass for both sides, so that dropout's masks are the same.
    jump = jump_with_rates(form, network, x, t, s, dx, -t, torch.zeros_like(s))
    return jump.value, (jump.value + jump.rate + shaped(jump.tangent)).detach()


@dataclass(frozen=True)
class FlowMap:
    """The flow map's objective. settings: of the student."""

    settings: objectives.FlowMap
    basis: Basis

    @classmethod
    def build(cls, settings: objectives.FlowMap, basis: Basis) -> Self:
        """Build the loss of a student."""
        return cls(settings, basis)

    def draw(self, shape: Shape, step: int, host: torch.Generator, device: torch.Generator) -> Spans:
        """Draw t >= s for every image; those on the diagonal are spread evenly over the batch."""
        settings, count = self.settings, shape[0]
        places = torch.arange(count + 1, dtype=torch.float64) * settings.diagonal
        on_diagonal = places.floor().diff() > 0
        times = self._times(2 * count, device).reshape(2, count)
        t = times.amax(0)
        s = torch.where(on_diagonal.to(t.device), t, times.amin(0))
        along = min(1.0, step / settings.tangent_warm_up) if settings.tangent_warm_up else 1.0
        return Spans(t, s, normal(shape, device), on_diagonal, along)

    def _times(self, count: int, device: torch.Generator) -> Tensor:
        """Draw times between eps and T, float64."""
        noise = self.basis.noise
        if self.settings.draw == "lognormal":
            drawn = lognormal_sigma(count, -1.1, 2.0, device).double()
            return drawn.clamp(noise.sigma_min, noise.sigma_max)
        low, high = noise.sigma_min ** (1 / noise.rho), noise.sigma_max ** (1 / noise.rho)
        uniform = torch.rand(count, generator=device, device=device.device, dtype=torch.float64)
        return (low + uniform * (high - low)).pow(noise.rho).clamp(noise.sigma_min, noise.sigma_max)

    def terms(self, images: Tensor, labels: Tensor | None, draws: Spans) -> Iterator[Term]:
        """Yield the flow term, then the term at s = t if it has images: each is a mean over all images of the part."""
        x_t = images + expand(draws.t, images) * draws.z
        for name, some in (("flow", ~draws.on_diagonal), ("diagonal", draws.on_diagonal)):
            rows = some.nonzero().squeeze(1).to(images.device, non_blocking=True)
            if not len(rows):
                continue
            t, s, x = draws.t[rows], draws.s[rows], x_t[rows]
            own = None if labels is None else labels[rows]
            sides = self.flow(x, t, s, own, draws.along) if name == "flow" else self.diagonal(x, t, own, images[rows])
            errors = self.basis.distance(*sides)
            if power := self.settings.adaptive_power:
                errors = errors / (errors.detach() + 1e-3) ** power
            share = len(rows) / len(images)
            taught = name == "flow" or self.settings.diagonal_target == "teacher"
            cost = (self.settings.derivative if name == "flow" else 3) + taught
            yield Term(name, errors.mean() * share, 1.0, cost * len(rows))

    def flow(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, along: float) -> tuple[Tensor, Tensor]:
        """Return the two sides of the identity."""
        student, form = self.basis.models.student, self.basis.preconditioning
        call = student if form.acts_on == "D" else student.raw
        teacher = with_labels(self.basis.models.teacher, labels)

        def network(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return call(x, t, s, labels)

        def shaped(tangent: Tensor) -> Tensor:
            if bound := self.settings.tangent_bound:
                size = tangent.detach().flatten(1).square().mean(1).sqrt()
                tangent = tangent / expand(size / bound + 1, tangent)
            return along * tangent

        identity = lagrangian if self.settings.form == "lagrangian" else eulerian
        return identity(form, network, teacher, x, t, s, shaped)

    def diagonal(self, x: Tensor, t: Tensor, labels: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's denoiser D_theta(x, t, t), and what it is compared with."""
        found = self.basis.models.student(x, t, t, labels)
        if self.settings.diagonal_target == "data":
            return found, images
        with torch.no_grad():
            return found, self.basis.models.teacher(x, t, labels=labels)
