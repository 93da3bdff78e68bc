"""The losses against their formulas, what they draw, and where their gradients go."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tests.draws import seeded
from tests.nets.small import make_denoiser
from tests.training.losses import EPS, T, fitted, passes
from torch import Tensor

from consistency.nets.denoiser import Denoiser, edm_coefficients
from consistency.theory.distance import pseudo_huber, squared_l2
from consistency.theory.noise import rho_grid
from consistency.theory.oracles import GaussianTeacher
from consistency.theory.preconditioning import Preconditioning, build_preconditioning
from consistency.theory.solver import expand
from consistency.training.denoising import Denoising
from consistency.training.endpoint import Endpoint
from consistency.training.objective import Objective
from consistency.training.trajectory import Trajectory

GRID = rho_grid(18, EPS, T)
Networks = tuple[Denoiser, Denoiser, Denoiser]


@dataclass
class Recorder:
    """A denoiser D(x, t[, s]) by formula, which writes down what it is called with."""

    gain: Callable[[Tensor], Tensor] = lambda t: 0.25 / (0.25 + t**2)
    centre: float = 0.0
    sigma_data: float = 0.5
    calls: list[tuple[Tensor, ...]] = field(default_factory=list)
    labels: list[Tensor | None] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.calls.append((x.detach(), t, *([] if s is None else [s])))
        self.labels.append(labels)
        return self.centre + expand(self.gain(t), x) * (x - self.centre)

    raw = __call__


@dataclass
class Losses:
    """All the terms of a step, "loss" among them, and the evaluations they took."""

    terms: dict[str, Tensor]
    evaluations: int


@dataclass
class Step:
    """A whole step of an objective, drawn from one generator."""

    objective: Objective

    def __call__(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Losses:
        draws = self.objective.draw(images.shape, 0, generator, generator)  # type: ignore[arg-type]
        terms = list(self.objective.terms(images, labels, draws))
        loss = sum((term.weight * term.value for term in terms), torch.zeros(()))
        return Losses({term.name: term.value for term in terms} | {"loss": loss}, sum(t.evaluations for t in terms))


def distillation(
    kind: type[Trajectory] | type[Endpoint],
    student: Any = None,
    average: Any = None,
    teacher: Any = None,
    *,
    preconditioning: str | Preconditioning = "ctm",
    distance: Callable[[Tensor, Tensor], Tensor] = squared_l2,
    grid: Tensor = GRID,
    target: str = "online",
    **own: Any,
) -> Step:
    """A step of distillation, with a recorder in the place of each network that is not given."""
    if isinstance(preconditioning, str):
        preconditioning = build_preconditioning(preconditioning, 0.5, fitted())
    networks = (student or Recorder(), average or Recorder(), teacher or Recorder())
    return Step(kind(*networks, preconditioning, distance, grid, target, **own))


def trajectory(*networks: Any, max_steps: int = len(GRID) - 1, dsm_weight: float = 1.0, **settings: Any) -> Step:
    return distillation(Trajectory, *networks, max_steps=max_steps, dsm_weight=dsm_weight, **settings)


def endpoint(*networks: Any, **settings: Any) -> Step:
    return distillation(Endpoint, *networks, **settings)


either = pytest.mark.parametrize("make", [trajectory, endpoint])


def node(t: Tensor) -> Tensor:
    """The index of each time in the grid; every time must be a node."""
    index = (GRID[:, None] - t[None]).abs().argmin(0)
    assert torch.equal(GRID[index], t)
    return index


# --- trajectory distillation: the formula


def test_the_loss_is_AP_7_written_out_for_a_gaussian() -> None:
    """All functions are linear in x there: every factor is recomputed in closed form from the recorded draws."""
    student, average, teacher = Recorder(), Recorder(lambda t: 0.3 / (0.3 + t**2)), Recorder()
    images = 0.5 * torch.randn(16, 1, 2, 2, dtype=torch.float64, generator=seeded(9))
    losses = trajectory(student, average, teacher, dsm_weight=0.7)(images, None, seeded())
    (x_t, t, s), (_, u, s_target), (x_dsm, sigma, sigma_s) = student.calls
    assert torch.equal(s, s_target)
    assert torch.equal(sigma, sigma_s)

    def jump(gain: Callable[[Tensor], Tensor], t: Tensor, s: Tensor) -> Tensor:
        return s / t + (1 - s / t) * gain(t)

    def heun(i: int) -> Tensor:
        slope = (1 - teacher.gain(GRID[i])) / GRID[i]
        step = GRID[i + 1] - GRID[i]
        ahead = 1 + step * slope
        return 1 + step / 2 * (slope + ahead * (1 - teacher.gain(GRID[i + 1])) / GRID[i + 1])

    spans = zip(node(t).tolist(), node(u).tolist(), strict=True)
    solved = torch.stack([torch.stack([heun(i) for i in range(a, b)]).prod() for a, b in spans])
    to_end = jump(average.gain, s, GRID[-1])
    estimate = to_end * jump(student.gain, t, s)
    target = to_end * jump(student.gain, u, s) * solved
    distillation = (expand((estimate - target) ** 2, x_t) * x_t**2).mean()
    sigma = sigma.double()
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    error = expand(student.gain(sigma), x_dsm) * x_dsm - images
    dsm = (expand(weight, x_dsm) * error**2).mean()
    torch.testing.assert_close(losses.terms["distillation"], distillation, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses.terms["dsm"].double(), dsm, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.terms["loss"], losses.terms["distillation"] + 0.7 * losses.terms["dsm"])


@pytest.mark.parametrize("target", ["online", "ema"])
def test_estimate_is_the_target_where_solver_and_jump_are_exact(target: str) -> None:
    """Data at one point: the ODE's solutions are straight lines, on which Heun and ctm make no error."""
    point = [Recorder(lambda t: torch.zeros_like(t), centre=0.3) for _ in range(3)]
    images = torch.full((64, 1, 2, 2), 0.3, dtype=torch.float64)
    for seed in range(5):
        terms = trajectory(*point, target=target)(images, None, seeded(seed)).terms
        assert terms["distillation"] < 1e-20
        assert terms["dsm"] < 1e-20


@pytest.mark.statistical
def test_with_exact_jumps_only_the_teachers_discretisation_is_left() -> None:
    """Heun's local error is of third order: twice the nodes, an eighth of the difference, a 64th of its square."""

    def error(nodes: int) -> float:
        class Exact:
            @staticmethod
            def jump(model: Any, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
                return expand(torch.sqrt((0.25 + s**2) / (0.25 + t**2)), x) * x

        images = torch.zeros(4096, 1, 1, 1, dtype=torch.float64)
        objective = trajectory(preconditioning=Exact(), grid=rho_grid(nodes, EPS, T), max_steps=1)  # type: ignore[arg-type]
        return objective(images, None, seeded()).terms["distillation"].item()

    assert 32 < error(40) / error(80) < 128


# --- trajectory distillation: the draws


@pytest.mark.statistical
def test_the_number_of_teacher_steps_is_drawn_with_probability_proportional_to_it() -> None:
    counts, images, generator, teacher = [0] * 3, torch.zeros(1, 1, 1, 1), seeded(), Recorder()
    objective = trajectory(teacher=teacher, max_steps=3)
    for _ in range(400):
        teacher.calls.clear()
        objective(images, None, generator)
        assert len(teacher.calls) % 2 == 0
        counts[len(teacher.calls) // 2 - 1] += 1
    expected = [400 * n / 6 for n in (1, 2, 3)]
    assert chisquare(counts, expected).pvalue > 1e-6, counts


@pytest.mark.statistical
def test_times_are_nodes_in_order_and_every_allowed_one_occurs() -> None:
    images, generator, nodes = torch.zeros(1024, 1, 1, 1), seeded(), len(GRID)
    starts, stops, longest = set(), set(), 0
    for max_steps in [1, 2, 3] + [nodes - 1] * 150:
        student, teacher = Recorder(), Recorder()
        trajectory(student, teacher=teacher, max_steps=max_steps)(images, None, generator)
        (_, t, s), (_, u, _), _ = student.calls
        first, last, to = node(t), node(u), node(s)
        steps = len(teacher.calls) // 2
        assert torch.equal(last, first + steps)
        assert bool((s <= u).all() and (to <= nodes - 1).all())
        assert set(first.tolist()) <= set(range(nodes - steps))
        starts |= set(first.tolist())
        stops |= set(to.tolist())
        longest = max(longest, steps)
    assert starts == set(range(nodes - 1))
    assert stops == set(range(1, nodes))
    assert longest == nodes - 1


@pytest.mark.statistical
def test_the_end_s_is_uniform_over_the_nodes_from_u_on() -> None:
    student = Recorder()
    trajectory(student, grid=GRID, max_steps=1)(torch.zeros(20_000, 1, 1, 1), None, seeded())
    (_, t, s), (_, u, _), _ = student.calls
    assert chisquare(torch.bincount(node(t)).tolist()).pvalue > 1e-6
    assert chisquare(torch.bincount(node(s)[node(u) == 10], minlength=18)[10:].tolist()).pvalue > 1e-6


@pytest.mark.statistical
def test_the_noised_image_has_the_variance_of_its_time() -> None:
    student = Recorder()
    trajectory(student)(torch.zeros(20_000, 1, 1, 1), None, seeded())
    for x, t, _ in (student.calls[0], student.calls[2]):
        assert (x[:, 0, 0, 0] / t).square().mean().item() == pytest.approx(1, abs=0.06)


def test_the_outer_jumps_end_at_eps() -> None:
    average = Recorder()
    trajectory(average=average)(torch.zeros(32, 1, 1, 1), None, seeded())
    assert len(average.calls) == 2
    for _, _, end in average.calls:
        assert torch.equal(end, torch.full((32,), EPS, dtype=torch.float64))


@either
@pytest.mark.parametrize("other", ["analytic", "analytic-forward", "bcm"])
def test_two_preconditionings_see_the_same_draws(make: Callable[..., Step], other: str) -> None:
    images = torch.randn(8, 1, 2, 2, generator=seeded())

    def seen(name: str) -> list[tuple[Tensor, ...]]:
        student, teacher = Recorder(), Recorder()
        make(student, teacher=teacher, preconditioning=name)(images, None, seeded(3))
        return [*student.calls, *teacher.calls]

    torch.testing.assert_close(seen(other), seen("ctm"), rtol=0, atol=0)


def test_labels_reach_every_network() -> None:
    networks = [Recorder() for _ in range(3)]
    labels = torch.arange(4)
    trajectory(*networks)(torch.zeros(4, 1, 1, 1), labels, seeded())
    for network in networks:
        assert network.labels
        assert all(given is labels for given in network.labels)


# --- trajectory distillation: gradients and cost


@pytest.fixture
def networks() -> Networks:
    """Student, average and teacher with weights of their own; only the student's ask for a gradient."""
    teacher = make_denoiser(0).eval().requires_grad_(False)
    student = make_denoiser(1, second_time=True).requires_grad_(True)
    average = make_denoiser(2, second_time=True).eval().requires_grad_(False)
    return student, average, teacher


def gradients(student: Denoiser, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(student.parameters()), materialize_grads=True, retain_graph=True))


@either
def test_gradients_reach_the_student_alone(networks: Networks, make: Callable[..., Step]) -> None:
    student, average, teacher = networks
    make(*networks)(torch.randn(8, 1, 4, 4), None, seeded()).terms["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in student.parameters())
    assert all(p.grad is None for model in (average, teacher) for p in model.parameters())


def test_the_gradient_flows_through_the_frozen_outer_jump(networks: Networks) -> None:
    """With an averaged target nothing else depends on the student: autograd must be the loss's own derivative."""
    for model in networks:
        model.double()
    student = networks[0]
    images = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=seeded())
    objective = trajectory(*networks, target="ema")

    def loss() -> Tensor:
        return objective(images, None, seeded(2)).terms["distillation"]

    along = gradients(student, loss())
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=seeded(4)) for p in student.parameters()]
    slope = sum(((g * d).sum() for g, d in zip(along, direction, strict=True)), torch.zeros(()))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(student.parameters(), direction, strict=True):
                p += step * d
            value = loss()
            for p, d in zip(student.parameters(), direction, strict=True):
                p -= step * d
        return value

    h = 1e-5
    torch.testing.assert_close((moved(h) - moved(-h)) / (2 * h), slope.detach(), rtol=1e-5, atol=1e-9)
    assert slope.abs() > 1e-3


@pytest.mark.parametrize("target", ["online", "ema"])
def test_the_target_has_no_gradient(networks: Networks, target: str) -> None:
    seen = []

    def distance(estimate: Tensor, goal: Tensor) -> Tensor:
        seen.append((estimate.requires_grad, goal.requires_grad))
        return squared_l2(estimate, goal)

    trajectory(*networks, target=target, distance=distance)(torch.randn(4, 1, 4, 4), None, seeded())
    assert seen == [(True, False)]


def test_the_online_and_the_averaged_target_differ_once_the_weights_do(networks: Networks) -> None:
    student, average, teacher = networks
    images = torch.randn(4, 1, 4, 4, generator=seeded())

    def loss(target: str) -> Tensor:
        return trajectory(student, average, teacher, target=target)(images, None, seeded(1)).terms["distillation"]

    assert not torch.equal(loss("online"), loss("ema"))
    average.load_state_dict(student.state_dict())
    online, averaged = loss("online"), loss("ema")
    assert torch.equal(online, averaged)
    torch.testing.assert_close(gradients(student, online), gradients(student, averaged))


def test_a_dsm_weight_of_0_removes_the_term(networks: Networks) -> None:
    terms = trajectory(*networks, dsm_weight=0.0)(torch.randn(4, 1, 4, 4), None, seeded(1)).terms
    torch.testing.assert_close(terms["loss"], terms["distillation"], rtol=0, atol=0)
    torch.testing.assert_close(*(gradients(networks[0], terms[name]) for name in ("loss", "distillation")))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@either
@pytest.mark.parametrize("seed", range(4))
def test_evaluations_are_the_passes_really_made(networks: Networks, make: Callable[..., Step], seed: int) -> None:
    images, step = torch.randn(4, 1, 4, 4), make(*networks)
    counted = passes(networks, lambda: step(images, None, seeded(seed)).terms["loss"].backward())
    assert step(images, None, seeded(seed)).evaluations == 4 * counted


# --- endpoint distillation


def test_endpoint_takes_neighbouring_nodes_to_eps() -> None:
    student, average, teacher = Recorder(), Recorder(), Recorder()
    endpoint(student, average, teacher)(torch.zeros(4096, 1, 1, 1), None, seeded())
    (_, t, end), (_, u, end_target) = student.calls
    assert torch.equal(node(u), node(t) + 1)
    assert set(node(t).tolist()) == set(range(17))
    for s in (end, end_target):
        assert torch.equal(s, torch.full_like(t, EPS))
    assert len(teacher.calls) == 2
    assert not average.calls


def test_endpoint_is_AP_5_written_out_for_a_gaussian() -> None:
    student, average, teacher = Recorder(), Recorder(lambda t: 0.3 / (0.3 + t**2)), Recorder()
    images = torch.zeros(64, 1, 1, 1, dtype=torch.float64)
    losses = endpoint(student, average, teacher, target="ema")(images, None, seeded())
    (x, t, _), (x_u, u, _) = student.calls[0], average.calls[0]
    slope = (1 - teacher.gain(t)) / t
    ahead = 1 + (u - t) * slope
    solved = 1 + (u - t) / 2 * (slope + ahead * (1 - teacher.gain(u)) / u)
    torch.testing.assert_close(x_u[:, 0, 0, 0], solved * x[:, 0, 0, 0])
    estimate = EPS / t + (1 - EPS / t) * student.gain(t)
    target = EPS / u + (1 - EPS / u) * average.gain(u)
    expected = ((estimate - target * solved) * x[:, 0, 0, 0]).square().mean()
    torch.testing.assert_close(losses.terms["loss"], expected, rtol=1e-9, atol=0)


# --- the teacher's loss


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_denoising_is_EDMs_formula() -> None:
    """Against E || F(c_in x, c_noise) - (x_0 - c_skip x) / c_out ||^2, EDM (8), with the draws made again."""
    model = make_denoiser(sigma_data=0.4)
    images = torch.randn(32, 1, 4, 4, generator=seeded())
    step = Step(Denoising(model, -1.2, 1.2))
    losses = step(images, None, seeded(1))
    again = seeded(1)
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(32, generator=again))
    x = images + expand(sigma, images) * torch.randn(images.shape, generator=again)
    c_skip, c_out, _, _ = (expand(c, x) for c in edm_coefficients(sigma, 0.4))
    expected = (model.raw(x, sigma) - (images - c_skip * x) / c_out).square().mean()
    torch.testing.assert_close(losses.terms["loss"], expected, rtol=1e-4, atol=1e-6)
    assert losses.evaluations == 32 * passes((model,), lambda: step(images, None, seeded(1)).terms["loss"].backward())


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [0.9, 0.97, 1.03, 1.1])
def test_denoising_is_least_for_the_exact_denoiser(factor: float) -> None:
    c = torch.tensor([0.05, 0.25, 1.0])
    exact = GaussianTeacher(c)
    images = torch.sqrt(c) * torch.randn(20_000, 3, generator=seeded())

    @dataclass
    class Model:
        factor: float
        sigma_data: float = 0.5

        def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.factor * exact(x, t)

    def loss(model: Any) -> float:
        return Step(Denoising(model, -1.2, 1.2))(images, None, seeded(1)).terms["loss"].item()

    assert loss(Model(1.0)) < loss(Model(factor))


# --- the distances


def test_pseudo_huber_is_a_norm_far_away_and_a_square_close_by() -> None:
    c = 0.00054 * 2
    far = pseudo_huber(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 10.0))
    torch.testing.assert_close(far, torch.tensor([20.0 - c]), rtol=1e-6, atol=0)
    a, b = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.full((1, 1, 2, 2), 1e-6, dtype=torch.float64)
    close = torch.tensor([2e-6**2 / (2 * c)], dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(a, b), close, rtol=1e-4, atol=0)


def test_pseudo_huber_has_a_gradient_where_the_two_are_equal() -> None:
    a = torch.zeros(2, 1, 2, 2, requires_grad=True)
    pseudo_huber(a, torch.zeros(2, 1, 2, 2)).sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, torch.zeros_like(a))
