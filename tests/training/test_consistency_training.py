"""Consistency training against its formula, what it draws, and where its gradients go."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.draws import numpy_draws, seeded
from tests.nets.small import make_denoiser
from tests.training.losses import EPS, fitted, passes
from torch import Tensor

from consistency.base.seeding import generator
from consistency.nets.denoiser import Denoiser
from consistency.theory.coupling import assignment
from consistency.theory.curriculum import DoublingCurriculum, ShrinkingCurriculum
from consistency.theory.distance import euclidean, pseudo_huber, squared_l2
from consistency.theory.preconditioning import build_preconditioning
from consistency.theory.solver import expand
from consistency.training.consistency_training import ConsistencyTraining, CoupledPairs, TransportTraining
from consistency.training.ema import Ema
from consistency.training.update import Stream, Update

BATCH = 8


def make(
    *, kind: type[ConsistencyTraining] = ConsistencyTraining, preconditioning: str = "cm", **changes: Any
) -> ConsistencyTraining:
    """make(mu=0.5, ...): iCT's loss on two small networks, the second the predictor."""
    settings: dict[str, Any] = {
        "student": make_denoiser(1),
        "predictor": make_denoiser(2).eval().requires_grad_(False),
        "preconditioning": build_preconditioning(preconditioning, 0.5, fitted()),
        "distance": squared_l2,
        "schedule": DoublingCurriculum(steps=80),
    }
    return kind(**{**settings, **changes})


def drawn(objective: ConsistencyTraining, step: int = 0, seed: int = 0, count: int = BATCH) -> CoupledPairs:
    return objective.draw((count, 1, 4, 4), step, seeded(seed), seeded(seed))


def loss(objective: ConsistencyTraining, images: Tensor, draws: CoupledPairs, labels: Tensor | None = None) -> Tensor:
    return next(objective.terms(images, labels, draws)).value


def batch(seed: int = 0) -> Tensor:
    return 0.5 * torch.randn(BATCH, 1, 4, 4, generator=seeded(seed))


# --- the formula


def cm_endpoint(model: Denoiser, x: Tensor, t: Tensor) -> Tensor:
    """The published cm pair, written out."""
    gap = t - EPS
    f, g = 0.25 / (gap**2 + 0.25), 0.5 * gap / (t**2 + 0.25).sqrt()
    return expand(f, x) * x + expand(g, x) * model.raw(x, t)


@pytest.mark.parametrize("mu", [0.0, 0.4, 1.0])
def test_the_loss_is_the_formula_written_out(mu: float) -> None:
    objective = make(mu=mu, distance=pseudo_huber)
    images, draws = batch(), drawn(objective, seed=5)
    predictor = objective.predictor
    assert predictor is not None
    x_hat = cm_endpoint(predictor, images + expand(draws.u, images) * draws.z, draws.u)
    assert mu in (0.0, 1.0) or 0 < draws.generated.sum() < BATCH
    data = torch.where(draws.generated[:, None, None, None], x_hat, images)
    upper = cm_endpoint(objective.student, data + expand(draws.t, images) * draws.z, draws.t)
    lower = cm_endpoint(objective.student, data + expand(draws.u, images) * draws.z, draws.u)
    c = 0.00054 * 4
    huber = ((upper - lower).flatten(1).square().sum(1) + c**2).sqrt() - c
    expected = (huber.double() / (draws.t - draws.u)).mean().float()
    torch.testing.assert_close(loss(objective, images, draws), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("preconditioning", ["cm", "ctm", "bcm", "analytic"])
def test_at_the_lowest_level_the_target_is_the_data_with_eps_of_noise(preconditioning: str) -> None:
    """The boundary condition: f(x, eps, eps) = x, whatever the network."""
    objective = make(preconditioning=preconditioning)
    x = batch()
    end = torch.full((BATCH,), EPS, dtype=torch.float64)
    assert torch.equal(objective.endpoint(objective.student, x, end, None), x)


def test_a_consistent_function_has_no_loss() -> None:
    """Data at one point: every pair (x + t z, x + u z) lies on one trajectory, whose end is x + eps z exactly."""

    class Exact:
        @staticmethod
        def jump(model: Any, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
            return 0.3 + expand(s / t, x) * (x - 0.3)

    images = torch.full((BATCH, 1, 4, 4), 0.3, dtype=torch.float64)
    for mu in (0.0, 1.0):
        objective = replace(make(mu=mu), preconditioning=Exact())  # type: ignore[arg-type]
        draws = drawn(objective)
        draws = replace(draws, z=draws.z.double())
        # A generated image is x + eps z, not x; its pair lies on x's line too, at t + eps instead of t.
        data = objective.coupled(images, None, draws)
        torch.testing.assert_close(data, images + (EPS * draws.z if mu else 0))
        if not mu:
            assert loss(objective, images, draws) < 1e-24


def test_ect_has_a_finite_gradient_where_both_sides_are_equal() -> None:
    objective = make(distance=euclidean, schedule=ShrinkingCurriculum(double_every=10))
    draws = drawn(objective)
    low = torch.full((BATCH,), EPS, dtype=torch.float64)
    loss(objective, batch(), replace(draws, t=low, u=low, weight=1 / low)).backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in objective.student.parameters())


def test_labels_reach_student_and_predictor() -> None:
    labelled = {"student": make_denoiser(1, label_dim=3), "predictor": make_denoiser(2, label_dim=3)}
    for mu in (0.0, 1.0):
        objective = make(mu=mu, **labelled)
        draws = drawn(objective)
        first, second = (loss(objective, batch(), draws, torch.full((BATCH,), k)) for k in (0, 1))
        assert not torch.equal(first, second)
    a, b = (objective.coupled(batch(), torch.full((BATCH,), k), draws) for k in (0, 1))
    assert not torch.equal(a, b)


# --- the draws


@pytest.mark.statistical
def test_the_levels_follow_the_step() -> None:
    objective = make()
    gaps = [(lambda d: d.t - d.u)(drawn(objective, step, count=512)).mean() for step in (0, 79)]
    assert gaps[0] > 20 * gaps[1]


# --- gradients, masks, cost


def test_gradients_reach_the_student_alone_and_through_the_upper_level_alone() -> None:
    objective = make(mu=0.5)
    objective.student.double()
    assert objective.predictor is not None
    objective.predictor.double()
    images, draws = batch().double(), drawn(objective)
    draws = replace(draws, z=draws.z.double())
    with torch.no_grad():
        data = objective.coupled(images, None, draws)
        target = cm_endpoint(objective.student, data + expand(draws.u, data) * draws.z, draws.u)
    upper = cm_endpoint(objective.student, data + expand(draws.t, data) * draws.z, draws.t)
    alone = ((upper - target).square().flatten(1).mean(1) * draws.weight).mean()
    weights = list(objective.student.parameters())
    expected = torch.autograd.grad(alone, weights, materialize_grads=True)
    found = torch.autograd.grad(loss(objective, images, draws), weights, materialize_grads=True)
    assert max(g.abs().max().item() for g in expected) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    loss(objective, images, draws).backward()
    assert all(p.grad is None for p in objective.predictor.parameters())


class Watched:
    """The dropout masks of a network's passes, as which outputs of each layer are zero."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: list[Tensor] = []
        real = torch.nn.functional.dropout

        def dropout(h: Tensor, p: float, training: bool) -> Tensor:
            kept = real(torch.ones_like(h), p, training) != 0
            self.masks.append(kept)
            return h * kept / (1 - p)

        monkeypatch.setattr(torch.nn.functional, "dropout", dropout)


def test_both_sides_have_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    objective = make(student=make_denoiser(1, dropout=0.5, depth=2).train())
    draws = drawn(objective)
    loss(objective, batch(), draws)
    target, estimate = watched.masks[:2], watched.masks[2:]
    assert len(estimate) == 2
    torch.testing.assert_close(target, estimate)
    assert all(0 < mask.float().mean() < 1 for mask in target)
    # The next pass meets other masks: the random state went on.
    loss(objective, batch(), draws)
    assert not torch.equal(watched.masks[4], watched.masks[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_sides_have_the_same_dropout_masks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    objective = make(student=make_denoiser(1, dropout=0.5).cuda().train())
    device = torch.Generator("cuda").manual_seed(0)
    loss(objective, batch().cuda(), objective.draw((BATCH, 1, 4, 4), 0, seeded(), device))
    assert torch.equal(*watched.masks)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize("dsm_weight", [0.0, 0.5])
def test_evaluations_are_the_passes_really_made(mu: float, dsm_weight: float) -> None:
    networks = {"student": make_denoiser(1, second_time=True), "predictor": make_denoiser(2, second_time=True)}
    objective = make(mu=mu, dsm_weight=dsm_weight, **networks)
    claimed = []

    def run() -> None:
        for term in objective.terms(batch(), None, drawn(objective)):
            term.value.backward()
            claimed.append(term.evaluations)

    assert BATCH * passes(networks.values(), run) == sum(claimed)


# --- optimal transport over the whole batch, and the step in parts


def make_update(objective: ConsistencyTraining, part: int = BATCH, labels: bool = False) -> Update:
    def batches(step: int) -> tuple[Tensor, Tensor | None]:
        images = 0.5 * torch.randn(BATCH, 1, 4, 4, generator=generator(0, "images", step))
        return images, torch.arange(BATCH) % 3 if labels else None

    optimizer = torch.optim.SGD(objective.student.parameters(), lr=1e-3)
    return Update(objective.student, optimizer, objective, Stream(batches, BATCH, part, 0, "test"))


@pytest.mark.parametrize("part", [4, 2, 1])
@pytest.mark.parametrize(
    ("kind", "mu"), [(ConsistencyTraining, 0.0), (ConsistencyTraining, 0.5), (TransportTraining, 0.0)]
)
def test_a_batch_in_parts_is_the_whole_batch(kind: type[ConsistencyTraining], mu: float, part: int) -> None:
    weights = []
    for size in (BATCH, part):
        update = make_update(make(kind=kind, mu=mu), size)
        for step in range(4):
            update.step(step)
        weights.append([p.detach() for p in update.model.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


def test_ot_pairs_the_whole_batch_within_its_classes() -> None:
    objective = make(kind=TransportTraining)
    images, draws = batch(), drawn(objective)
    for labels in (None, torch.arange(BATCH) % 3):
        paired = objective.pair(images, labels, draws)  # type: ignore[attr-defined]
        assert torch.equal(paired.z, draws.z[assignment(images, draws.z, labels)])
        assert not torch.equal(paired.z, draws.z)
        assert torch.equal(paired.t, draws.t)


def test_ot_really_reaches_the_step() -> None:
    values = [make_update(make(kind=kind)).step(0)[0]["loss"] for kind in (ConsistencyTraining, TransportTraining)]
    assert not torch.equal(*values)


# --- it learns


@pytest.mark.statistical
def test_training_brings_down_the_distance_between_neighbours() -> None:
    student = make_denoiser(1, width=32)
    average = Ema(student, 0.99, warm_up=2 / 3)
    objective = make(
        student=student,
        predictor=average.model,
        mu=0.5,
        distance=pseudo_huber,
        schedule=DoublingCurriculum(steps=400, first=4, last=4),
    )
    update = replace(make_update(objective), optimizer=torch.optim.Adam(student.parameters(), lr=3e-3))
    held_out, draws = batch(9), drawn(replace(objective, mu=0.0), seed=9)
    before = loss(replace(objective, mu=0.0), held_out, draws).item()
    for step in range(400):
        update.step(step)
        average.update(step + 1)
    assert loss(replace(objective, mu=0.0), held_out, draws).item() < 0.8 * before


# --- laws, with any batch


def some_batch(seed: int) -> tuple[Tensor, int, float]:
    """Images [N, 1, 4, 4] of a size that the seed says, a step, and a mu."""
    draws = numpy_draws(seed)
    images = 0.5 * torch.randn(int(draws.integers(2, 40)), 1, 4, 4, generator=seeded(seed))
    return images, int(draws.integers(0, 80)), float(draws.uniform(0.1, 0.9))


def rows_of(draws: CoupledPairs, rows: Tensor) -> CoupledPairs:
    """The draws of some images."""
    return replace(draws, **{name: value[rows] for name, value in vars(draws).items() if value is not None})


@pytest.mark.parametrize("seed", range(10))
def test_at_mu_0_gc_is_ic_bit_for_bit(seed: int) -> None:
    """Loss, gradient, and what is left of the random state for the next step."""
    images, step, _ = some_batch(seed)
    found = []
    for predictor in ({}, {"predictor": None}):
        objective = make(mu=0.0, distance=pseudo_huber, **predictor)
        host, device = seeded(seed), seeded(seed + 1)
        value = loss(objective, images, objective.draw(images.shape, step, host, device))
        value.backward()
        gradient = torch.cat([p.grad.flatten() for p in objective.student.parameters() if p.grad is not None])
        found.append((value.detach(), gradient, host.get_state(), device.get_state()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [ConsistencyTraining, TransportTraining])
@pytest.mark.parametrize("seed", range(8))
def test_neither_parts_nor_order_of_a_batch_matter(kind: type[ConsistencyTraining], seed: int) -> None:
    images, step, mu = some_batch(seed)
    objective = make(kind=kind, mu=mu)
    draws = objective.draw(images.shape, step, seeded(seed), seeded(seed))
    order = torch.randperm(len(images), generator=seeded(seed + 1))
    mixed, shuffled = images[order], rows_of(draws, order)
    if isinstance(objective, TransportTraining):
        draws, shuffled = objective.pair(images, None, draws), objective.pair(mixed, None, shuffled)
        assert torch.equal(shuffled.z, draws.z[order])
    whole = loss(objective, images, draws).item()
    assert loss(objective, mixed, shuffled).item() == pytest.approx(whole, rel=1e-4)
    cut = int(numpy_draws(seed).integers(1, len(images)))
    parts = torch.arange(len(images)).tensor_split([cut])
    shares = [len(rows) / len(images) * loss(objective, images[rows], rows_of(draws, rows)).item() for rows in parts]
    assert sum(shares) == pytest.approx(whole, rel=1e-4)
