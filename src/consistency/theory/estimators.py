"""Estimates of l_t and s_t from a teacher: products with its Jacobian on noised training images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from consistency.theory.solver import DenoiserFn

Array = np.ndarray
Mode = Literal["reverse", "forward"]
#: rows("name", N, row) is row(0) to row(N - 1), stacked; the name is that of no other table of a fit
Rows = Callable[[str, int, Callable[[int], Array]], Array]

# s_t runs from about -2 (small t) to 2 (large t) in every closed form we know; an estimate with a standard error this
# large is meaningless.
_S_RANGE = 2.0
#: images of a fit at first, and groups of images that are left out in turn
_FIRST, _GROUPS = 128, 8


@dataclass(frozen=True)
class CoefficientFit:
    """l_t and s_t with their standard errors, each float64 [N] over the times [N].

    determined [N] is False where ||h|| is too small for s_t to be known; s is interpolated there (-1, the value of
    ctm, where no time determines it) and s_se is the width of the range s can take. Never NaN. centred: the fit of
    x - mu and D - mu (ours), if there is a centre mu. Its l_t is the same. images: the number used; error: the largest
    standard error of f and g at the jumps that were given.
    """

    times: Array
    l: Array
    l_se: Array
    s: Array
    s_se: Array
    determined: Array
    centred: "CoefficientFit | None" = None
    images: int = 0
    error: float = math.inf

    @property
    def nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Times, l and s as tensors [N], as `GeneralizedODE` takes them."""
        return torch.from_numpy(self.times), torch.from_numpy(self.l), torch.from_numpy(self.s)

    def arrays(self) -> dict[str, Array]:
        """Return the arrays of coefficients.npz, all but the mean image: those of the centred fit with that ending."""
        around = self.centred
        assert around is not None
        shared = {name: getattr(self, name) for name in ("times", "l", "l_se", "s", "s_se", "determined")}
        return shared | {"s_centred": around.s, "s_centred_se": around.s_se, "determined_centred": around.determined}


def one_by_one(name: str, count: int, row: Callable[[int], Array]) -> Array:
    """Compute `Rows` one after the other."""
    return np.stack([row(k) for k in range(count)])


def fit_coefficients(
    teacher: Callable[[slice], DenoiserFn],
    images: Tensor,
    noise: Tensor,
    times: Tensor,
    probes: int | None,
    generator: torch.Generator,
    batch: int,
    rows: Rows = one_by_one,
    centre: Tensor | None = None,
    mode: Mode = "reverse",
    jumps: Callable[[CoefficientFit], Array] | None = None,
    tolerance: float = 0.0,
) -> CoefficientFit:
    """Fit l_t (AP (15)) and s_t (AP (17)) at each time, on x_t = x_0 + t z; with a centre [...], around it too.

    jumps(fit) is f and g at the jumps that matter: the fit begins with some of the images and takes twice as many until
    the standard error of each of these numbers (relative, above 1) is at most the tolerance, or until it has all.

    teacher(part) is the denoiser of those images (with their labels bound). images, noise: [K, ...], K >= 2; times:
    [N], descending. probes: Rademacher vectors an image for the trace, or None for the exact trace (d products).
    rows: may keep what it computes, and share it between processes. The same images, noise and probes serve every time,
    so that the error of l_t is smooth in t and dl/dlambda is not swamped by it. Raises ValueError, naming the time and
    the layer, if the teacher returns NaN.
    """
    signs = None
    if probes is not None:
        shape = (probes, *images.shape)
        signs = torch.randint(0, 2, shape, generator=generator, device=images.device, dtype=torch.int8) * 2 - 1
    nodes, dimension = times.double().cpu().numpy(), images[0].numel()
    found: list[Array] = []
    seen, count = 0, min(_FIRST, len(images))

    def measured(seen: int, count: int, k: int) -> Array:
        """Return the moments [6 or 9, count - seen] of those images at time k."""
        parts = []
        for first in range(seen, count, batch):
            part = slice(first, min(first + batch, count))
            x = images[part] + times[k].to(images.dtype) * noise[part]
            probe = None if signs is None else signs[:, part].to(x.dtype)
            denoiser, time = teacher(part), times[k].item()
            parts.append(image_moments(denoiser, x, time, probe, centre, mode))
            if not np.isfinite(parts[-1]).all():
                where = bad_layer(partial(denoiser, x, torch.full((len(x),), time).to(x)))
                raise ValueError(f"the denoiser returned NaN or infinity at t = {time:g}, {where}")
        return np.concatenate(parts, axis=1)

    def solve(some: Array) -> CoefficientFit:
        return solve_moments(nodes, some, dimension, images.dtype)

    while True:
        found.append(rows(f"{seen}", len(times), partial(measured, seen, count)))
        used = np.concatenate(found, axis=2)
        error = math.inf if jumps is None else float(jackknife(lambda some: jumps(solve(some)), used).max())
        if count == len(images) or error <= tolerance:
            return replace(solve(used), images=count, error=error)
        seen, count = count, min(2 * count, len(images))


def jackknife(values: Callable[[Array], Array], moments: Array) -> Array:
    """Return the standard errors of values(moments), moments [..., K], over images, relative where a value is above 1:
    each eighth of the images is left out once."""
    parts = np.array_split(np.arange(moments.shape[-1]), min(_GROUPS, moments.shape[-1]))
    left = np.stack([values(np.delete(moments, part, axis=-1)) for part in parts])
    return np.asarray(left.std(0) * np.sqrt(len(parts) - 1) / np.maximum(1, np.abs(left.mean(0))))


@torch.no_grad()
def bad_layer(evaluate: Callable[[], object]) -> str:
    """Return 'first in its layer NAME' for the first module whose output is not finite, by its path in the network."""
    names: dict[nn.Module, str] = {}
    found: list[str] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if not names:  # the outermost module is entered first
            names.update((each, name) for name, each in module.named_modules())

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            found.append(f"first in its layer {names.get(module) or type(module).__name__}")

    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave):
        evaluate()
    return found[0] if found else "in no layer's output: in its derivatives, or outside its layers"


def image_moments(
    denoiser: DenoiserFn,
    x: Tensor,
    time: float,
    probes: Tensor | None,
    centre: Tensor | None = None,
    mode: Mode = "reverse",
) -> Array:
    """Per image: tr dD/dx, then r.r, r.x, x.x, r.J, x.J with r = D - x and J = dD/dlambda along the ODE. [6, K]; with a
    centre [...], r.y, y.y, y.J with y = x - centre as well, [9, K].

    mode reverse: J is only needed in products w.J = (dD/dx^T w).r - t dD/dt^T w, so one evaluation with its graph and a
    vector-Jacobian product for each probe, r, x and y are enough. Forward: a Jacobian-vector product for each probe and
    for J, and an evaluation.
    """
    t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
    ends = [x] if centre is None else [x, x - centre]
    if probes is None:
        basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
        vectors, scale = (e.expand_as(x) for e in basis), 1.0
    else:
        vectors, scale = iter(probes), 1 / len(probes)
    products = _backward_products if mode == "reverse" else _forward_products
    trace, residual, along = products(denoiser, x, t, vectors, ends)
    pairs = [(residual, residual), *((a, b) for end in ends for a, b in ((residual, end), (end, end)))]
    rr, rx, xx, *ry = (_dot(a, b) for a, b in pairs)
    rows = [trace * scale, rr, rx, xx, along[0], along[1], *ry, *along[2:]]
    return torch.stack(rows).detach().cpu().numpy()


Products = tuple[Tensor, Tensor, list[Tensor]]


def _backward_products(
    denoiser: DenoiserFn, x: Tensor, t: Tensor, vectors: Iterable[Tensor], ends: list[Tensor]
) -> Products:
    """Return the sum of v . (dD/dx) v over the vectors, r, and w . J for w = r and each of the ends."""
    with torch.enable_grad():
        point, moment = x.detach().requires_grad_(), t.detach().requires_grad_()
        denoised = denoiser(point, moment)

    def product(w: Tensor) -> tuple[Tensor, Tensor]:
        on_x, on_t = torch.autograd.grad(
            denoised, (point, moment), w, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return on_x, on_t

    residual = denoised.detach() - x
    trace = sum((_dot(product(v)[0], v) for v in vectors), torch.zeros(len(x), dtype=torch.float64, device=x.device))
    along = []
    for w in (residual, *ends):
        on_x, on_t = product(w)
        along.append(_dot(on_x, residual) - t.double() * on_t.double())
    return trace, residual, along


def _forward_products(
    denoiser: DenoiserFn, x: Tensor, t: Tensor, vectors: Iterable[Tensor], ends: list[Tensor]
) -> Products:
    """Return the same as `_backward_products`, by Jacobian-vector products."""
    traces = [_dot(v, jvp(lambda point: denoiser(point, t), (x,), (v,))[1]) for v in vectors]
    with torch.no_grad():
        residual = denoiser(x, t) - x
    along = jvp(denoiser, (x, t), (residual, -t))[1]
    return torch.stack(traces).sum(0), residual, [_dot(w, along) for w in (residual, *ends)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


def solve_moments(
    times: Array, moments: Array, dimension: int, precision: torch.dtype, drawn: bool = True
) -> CoefficientFit:
    """Return l_t and s_t from the per-image moments [N, 6 or 9, K] of `image_moments`, with delta-method standard
    errors.

    precision: the dtype in which the denoiser computed; drawn: False if the moments are a quadrature's, without error.
    s_t = a / b, with a = E[h . h'] and b = E||h||^2, depends on l_t and its slope m_t = dl/dlambda. An image that moves
    the mean of l by e_t (at all times) moves that of m by de/dlambda, and that of
        s_t by (h . h' - s ||h||^2 + (da/dl - s db/dl) e + (da/dm) de/dlambda) / b.
    """
    trace, rr, rx, xx, rj, xj, *around = moments.transpose(1, 0, 2)
    lam = -np.log(times)
    l = 1 - trace.mean(1) / dimension
    slope = CubicSpline(lam, l)(lam, 1)
    c, d = l[:, None], slope[:, None]
    # The influence of each image, [N, K]. The slope of a spline is linear in its values.
    on_l = 1 - trace / dimension - c
    on_slope = CubicSpline(lam, on_l)(lam, 1)
    floor = rounding_floor(rr, xx, l, precision)
    l_se = standard_error(on_l) if drawn else np.zeros(len(times))

    def solve(rx: Array, xx: Array, xj: Array, centred: CoefficientFit | None = None) -> CoefficientFit:
        # h = r + l x and h' = J - (1 - l) r + (dl/dlambda) x, expanded: no difference of large numbers at small t.
        h_h = rr + 2 * c * rx + c**2 * xx
        h_dh = rj - (1 - c) * rr + d * rx + c * xj - c * (1 - c) * rx + c * d * xx
        size = h_h.mean(1)
        safe = np.maximum(size, floor)
        s = h_dh.mean(1) / safe
        by_slope = (rx + c * xx).mean(1)
        by_l = (rr + xj - (1 - 2 * c) * rx + d * xx).mean(1) - 2 * s * by_slope
        on_s = (h_dh - s[:, None] * h_h + by_l[:, None] * on_l + by_slope[:, None] * on_slope) / safe[:, None]
        s_se = standard_error(on_s) if drawn else np.zeros(len(times))
        return settled(times, (l, l_se), (s, s_se), size > floor, centred)

    return solve(rx, xx, xj, solve(*around) if around else None)


def standard_error(values: Array) -> Array:
    """Return the standard error of the mean over images of values [N, K]; [N]."""
    return values.std(1, ddof=1) / np.sqrt(values.shape[1])


def rounding_floor(rr: Array, xx: Array, l: Array, precision: torch.dtype) -> Array:
    """Return the size [N] below which E||h||^2, h = r + l x, is rounding: rr, xx [N, K], l [N] as in `solve_moments`.

    precision: the dtype in which the denoiser computed. A denoiser's rounding is relative to x, not to r = D - x.
    """
    # D is taken to be accurate to 4 eps |x|; the products are summed in float64, wrong by some 0.4 eps of their size.
    computed = (4 * torch.finfo(precision).eps) ** 2 * xx
    summed = 64 * np.finfo(float).eps * (rr + l[:, None] ** 2 * xx)
    return (computed + summed).mean(1) + np.finfo(float).tiny


def settled(
    times: Array,
    l: tuple[Array, Array],
    s: tuple[Array, Array],
    known: Array,
    centred: CoefficientFit | None = None,
) -> CoefficientFit:
    """Return the fit with s interpolated at undetermined times; l, s: values and standard errors; known: True at times
    with ||h|| above rounding. All [N]."""
    lam = -np.log(times)
    value, error = s
    determined = known & (error < _S_RANGE)
    if determined.any():
        value = np.where(determined, value, np.interp(lam, lam[determined], value[determined]))
    else:
        value = np.full_like(value, -1.0)
    return CoefficientFit(times, *l, value, np.where(determined, error, _S_RANGE), determined, centred)
