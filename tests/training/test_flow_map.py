"""The flow map's two identities, against exact flows and formulas, and each of its options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.conftest import ABSENT, Tiny, mistake
from tests.draws import seeded
from tests.nets.small import make_denoiser
from tests.training.losses import EPS, T
from torch import Tensor

from consistency.config.dataset import Noise
from consistency.config.objectives import FlowMap as Settings
from consistency.nets.denoiser import Denoiser
from consistency.theory.distance import squared_l2
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import log_grid
from consistency.theory.oracles import MixtureTeacher
from consistency.theory.preconditioning import FORMS, Preconditioning, build_preconditioning
from consistency.theory.solver import expand
from consistency.training.flow_map import FlowMap, eulerian, jump_with_rates, lagrangian
from consistency.training.objective import Basis, Models
from consistency.training.stopwatch import Stopwatch

Flow = Callable[[Tensor, Tensor, Tensor], Tensor]
BETWEEN_ANY_TIMES = [name for name, form in FORMS.items() if not form.only_to_eps]
identities = pytest.mark.parametrize("identity", [lagrangian, eulerian])
forms = pytest.mark.parametrize("name", BETWEEN_ANY_TIMES)


def member(name: str, shape: tuple[int, ...] = (2, 1, 1)) -> Preconditioning:
    """A member of the family with l_t and s_t of no data at all."""
    draws = seeded(3)
    l = torch.rand(40, generator=draws, dtype=torch.float64)
    s = 3 * torch.randn(40, generator=draws, dtype=torch.float64).clamp(-1, 1)
    ode = GeneralizedODE(log_grid(40, EPS, T), l, s, centre=torch.randn(shape, generator=draws))
    return build_preconditioning(name, 0.5, ode, 0.3)


def denoiser_of(flow: Flow, form: Preconditioning, error: float = 0.0) -> Flow:
    """What the network of a student must be for its jump to be that flow, with an error that depends on all times."""

    def network(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        f, g = form.coefficients(t, s)
        mean = 0.0 if form.centre is None else expand(1 - f - g, x) * form.centre
        return (flow(x, t, s) - expand(f, x) * x - mean) / expand(g, x) + error * expand(torch.sin(t + s), x)

    return network


def gaussian() -> tuple[Any, Flow]:
    """The denoiser of a Gaussian with a mean, and its flow, in closed form."""
    variance, mean = torch.tensor([0.01, 1.5]).reshape(2, 1, 1).double(), torch.tensor([0.3, -0.4]).reshape(2, 1, 1)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return mean + variance / (variance + expand(t, x) ** 2) * (x - mean)

    def flow(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t, s = expand(t, x), expand(s, x)
        return mean + torch.sqrt((variance + s**2) / (variance + t**2)) * (x - mean)

    return denoise, flow


def mixture() -> tuple[Any, Flow]:
    """The denoiser of a mixture of two Gaussians, and its flow by 40 steps of Runge and Kutta's method in lambda."""
    weights, variances = torch.tensor([1 / 3, 2 / 3]).double(), torch.tensor([1.0, 0.25]).double()
    teacher = MixtureTeacher(weights, torch.tensor([[-2.0, 0.5], [1.0, -1.0]]).double(), variances)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return teacher(x.flatten(1), t).reshape(x.shape)

    def flow(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        step, time = (t / s).log() / 40, t

        def slope(x: Tensor, time: Tensor) -> Tensor:
            return denoise(x, time) - x

        for _ in range(40):
            middle, there, h = time * torch.exp(-step / 2), time * torch.exp(-step), expand(step, x)
            a = slope(x, time)
            b = slope(x + h / 2 * a, middle)
            c = slope(x + h / 2 * b, middle)
            x, time = x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c, there)), there
        return x

    return denoise, flow


def times(count: int, low: float = EPS, high: float = T) -> tuple[Tensor, Tensor]:
    """t > s, uniform in ln t."""
    uniform = torch.rand(2, count, generator=seeded(1), dtype=torch.float64).sort(0, descending=True).values
    t, s = low * (high / low) ** uniform
    return t, s


CASES = [(gaussian, EPS, T, name) for name in BETWEEN_ANY_TIMES] + [(mixture, 0.2, 5.0, "analytic-midpoint-centred")]


@identities
@pytest.mark.parametrize(("data", "low", "high", "name"), CASES)
def test_the_residual_of_every_member_is_zero_at_the_exact_flow_and_there_alone(
    identity: Any, data: Any, low: float, high: float, name: str
) -> None:
    (denoise, flow), form, (t, s) = data(), member(name), times(16, low, high)
    x = expand(torch.sqrt(1 + t**2), t.new_zeros(1, 1, 1, 1)) * torch.randn(16, 2, 1, 1, generator=seeded(2)).double()
    found, wanted = identity(form, denoiser_of(flow, form), denoise, x, t, s)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if data is mixture else 1e-9)
    found, wanted = identity(form, denoiser_of(flow, form, 0.1), denoise, x, t, s)
    assert (found - wanted).abs().mean() > 1e-3


@forms
def test_rates_are_those_of_finite_differences(name: str) -> None:
    model, form = make_denoiser(second_time=True).double(), member(name, (1, 4, 4))
    t, s = times(8, 0.1, 20.0)
    x, dx = torch.randn(2, 8, 1, 4, 4, generator=seeded(4), dtype=torch.float64)
    call = model if form.acts_on == "D" else model.raw

    def network(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return call(x, t, s)

    jump = jump_with_rates(form, network, x, t, s, dx, -t, -2 * s)
    ahead, behind = (form.jump(model, x + h * dx, t - h * t, s - 2 * h * s) for h in (1e-5, -1e-5))
    torch.testing.assert_close(jump.value, form.jump(model, x, t, s))
    torch.testing.assert_close(jump.rate + jump.tangent, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-7)


def test_ctms_eulerian_identity_is_meanflows() -> None:
    """D_theta = D_phi + (t - s) d/dt D_theta, of the denoiser, with the derivative along the teacher's path."""
    denoise, flow = gaussian()
    form, (t, s) = member("ctm"), times(16)
    network = denoiser_of(flow, form, 0.1)
    x = torch.randn(16, 2, 1, 1, generator=seeded(5), dtype=torch.float64)
    found, wanted = eulerian(form, network, denoise, x, t, s)
    along = torch.func.jvp(lambda x, t: network(x, t, s), (x, t), (denoise(x, t) - x, -t))[1]
    share = expand(s / t, x)
    by_hand = share * (denoise(x, t) - network(x, t, s)) + (1 - share) * along
    torch.testing.assert_close(wanted - found, by_hand)


@identities
@forms
def test_nothing_overflows_at_the_corners(identity: Any, name: str) -> None:
    model = make_denoiser(second_time=True)
    form = member(name, (1, 4, 4))
    t, s = torch.tensor([[T, EPS], [T, 79.999], [0.0021, EPS]], dtype=torch.float64).unbind(1)
    x = expand(t, torch.zeros(1, 1, 1, 1)).float() * torch.randn(3, 1, 4, 4, generator=seeded(6))

    def network(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (model if form.acts_on == "D" else model.raw)(x, t, s)

    for side in identity(form, network, lambda x, t: model(x, t), x, t, s):
        assert side.dtype == torch.float32
        assert side.isfinite().all()


def objective(student: Denoiser | None = None, **settings: Any) -> FlowMap:
    """The objective with small networks, whose student has a second time."""
    student = student or make_denoiser(second_time=True)
    teacher = make_denoiser(seed=1)
    basis = Basis(
        Models(student, student, teacher, student), member("ctm"), squared_l2, Noise(), torch.device("cpu"), Stopwatch()
    )
    whole = {"steps": 10, "batch": 8, "snapshot_every": 10, "log_every": 10, "objective": "flow_map"} | settings
    return FlowMap.build(Settings.model_validate(whole), basis)


def terms_of(loss: FlowMap, images: Tensor, step: int = 0, parts: int = 1) -> dict[str, float]:
    draws = loss.draw(images.shape, step, seeded(), seeded())  # type: ignore[arg-type]
    share, found = len(images) // parts, dict[str, float]()
    for first in range(0, len(images), share):
        rows = slice(first, first + share)
        for term in loss.terms(images[rows], None, draws.part(rows)):
            found[term.name] = found.get(term.name, 0.0) + term.value.item() / parts
    return found


IMAGES = torch.rand(16, 1, 4, 4, generator=seeded(7)) * 2 - 1


def test_a_step_in_parts_is_the_whole_step() -> None:
    loss = objective(diagonal=0.3)
    whole = terms_of(loss, IMAGES)
    for parts in (2, 4, 16):
        assert terms_of(loss, IMAGES, parts=parts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("draw", ["rho", "lognormal"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_times_are_in_range_and_their_share_on_the_diagonal_is_the_studys(draw: str, share: float) -> None:
    draws = objective(draw=draw, diagonal=share).draw((1000, 1, 4, 4), 0, seeded(), seeded())
    assert EPS <= draws.s.min() <= draws.t.max() <= T
    assert int(draws.on_diagonal.sum()) == pytest.approx(1000 * share, abs=1)
    assert torch.equal(draws.s == draws.t, draws.on_diagonal)


def test_on_the_diagonal_the_student_is_the_teacher_or_sees_the_image() -> None:
    loss = objective()
    model = loss.basis.models
    x, t = IMAGES + 1.0, torch.full((16,), 2.0, dtype=torch.float64)
    found, wanted = loss.diagonal(x, t, None, IMAGES)
    assert torch.equal(found, model.student(x, t, t))
    assert torch.equal(wanted, model.teacher(x, t))
    assert not wanted.requires_grad
    assert torch.equal(objective(diagonal_target="data").diagonal(x, t, None, IMAGES)[1], IMAGES)


def test_the_tangent_is_bounded_and_brought_in() -> None:
    x = 5 * torch.randn(16, 1, 4, 4, generator=seeded(8))
    t, s = times(16)
    free, bounded, off, half = (
        objective(**settings).flow(x, t, s, None, along)[0]
        for settings, along in (({}, 1.0), ({"tangent_bound": 0.01}, 1.0), ({}, 0.0), ({}, 0.5))
    )
    size = (bounded - off).flatten(1).square().mean(1).sqrt()
    assert bool((size < 0.01).all())
    torch.testing.assert_close(half, (free + off) / 2)
    draws = [objective(tangent_warm_up=4).draw(IMAGES.shape, step, seeded(), seeded()).along for step in (0, 1, 9)]
    assert draws == [0.0, 0.25, 1.0]


def test_meanflows_weight_divides_by_a_power_of_the_error() -> None:
    rows = torch.arange(16)
    loss, plain = objective(diagonal=0.0, adaptive_power=1.0), objective(diagonal=0.0)
    draws = plain.draw(IMAGES.shape, 0, seeded(), seeded())
    (weighted,), errors = loss.terms(IMAGES, None, draws), []
    for k in rows.tolist():
        one = slice(k, k + 1)
        errors.append(next(plain.terms(IMAGES[one], None, draws.part(one))).value.item())
    assert weighted.value.item() == pytest.approx(sum(e / (e + 1e-3) for e in errors) / 16, rel=1e-5)


@pytest.mark.parametrize("form", ["lagrangian", "eulerian"])
def test_gradients_reach_the_student_alone_and_labels_every_network(form: str) -> None:
    loss = objective(form=form)
    draws = loss.draw(IMAGES.shape, 0, seeded(), seeded())
    torch.stack([term.value for term in loss.terms(IMAGES, None, draws)]).sum().backward()
    models = loss.basis.models
    assert all(weight.grad is None for weight in models.teacher.parameters())
    assert sum(float(weight.grad.abs().sum()) for weight in models.student.parameters() if weight.grad is not None) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.distance": "lpips"}, "is for endpoints"),
        ({"students.ctm.preconditioning": "cm"}, "is defined for s = eps only"),
    ],
)
def test_what_a_flow_map_cannot_have_is_refused(tiny: Tiny, changes: dict[str, Any], message: str) -> None:
    assert message in mistake(tiny, flow_study(changes))


def flow_study(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes that make the tiny study one of flow maps."""
    names = ("student.nodes", "student.max_heun_steps", "student.dsm_weight")
    fixed = {"student.objective": "flow_map", "report.baseline": {"flow_map": "ctm"}}
    return {**dict.fromkeys(names, ABSENT)} | fixed | changes
