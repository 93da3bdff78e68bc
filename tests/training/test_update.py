"""One optimiser step: the same in however many parts, the balance of its two terms, and lower precision."""

from typing import Any

import pytest
import torch
from tests.conftest import mistake
from tests.draws import SEED
from tests.nets.small import ARCHITECTURES, make_denoiser
from torch import Tensor

from consistency.base.errors import UserError
from consistency.base.seeding import generator
from consistency.nets.denoiser import build_denoiser, init_denoiser, student_from_teacher
from consistency.nets.official import official_architecture
from consistency.runtime.distributed import Ranks
from consistency.theory.distance import squared_l2
from consistency.theory.noise import rho_grid
from consistency.theory.preconditioning import build_preconditioning
from consistency.training.ema import Ema
from consistency.training.trajectory import Jumps, Trajectory
from consistency.training.update import Stream, Update, share_of

BATCH = 8


def update(*, dsm_weight: float = 0.7, precision: str = "float32", **changes: Any) -> Update:
    """update(part=4, adaptive=True, ...): CTM's step for a student of a small teacher; gradients are large at once."""
    teacher = make_denoiser(0).eval().requires_grad_(False)
    student = student_from_teacher(teacher, dropout=0.0).train().requires_grad_(True)
    average = Ema(student, 0.9)
    for model in (student, average.model, teacher):
        model.compute_in(precision)
    objective = Trajectory(
        *(student, average.model, teacher, build_preconditioning("ctm", 0.5), squared_l2, rho_grid(6, 0.002, 80.0)),
        target="online",
        max_steps=5,
        dsm_weight=dsm_weight,
    )

    def batches(step: int) -> tuple[Tensor, None]:
        return torch.randn(BATCH, 1, 4, 4, generator=generator(SEED, "images", step)), None

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "float16")
    stream = Stream(batches, BATCH, changes.pop("part", BATCH), 0, "test")
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    return Update(student, optimizer, objective, stream, **{"scaler": scaler, **changes})


def trained(one: Update, steps: int = 5) -> tuple[list[Tensor], list[dict[str, float]]]:
    """The weights after some steps, and the terms of each."""
    terms = [{k: v.item() for k, v in one.step(step)[0].items()} for step in range(steps)]
    return [weight.detach() for weight in one.model.parameters()], terms


# --- accumulation


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("part", [4, 2, 1])
def test_a_batch_in_parts_is_the_whole_batch(part: int, adaptive: bool) -> None:
    whole, terms = trained(update(adaptive=adaptive))
    parts, same_terms = trained(update(adaptive=adaptive, part=part))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(same_terms, terms, rtol=1e-5, atol=0)


def test_the_parts_count_every_evaluation_once() -> None:
    assert update(part=2).step(0)[1] == update().step(0)[1]


@pytest.mark.parametrize(
    ("batch", "per_device", "world", "message"),
    [
        (8, None, 3, "a batch of 8 cannot be shared by 3 processes"),
        (8, 3, 1, "compute.batch_per_device 3 does not divide the 8 images"),
        (12, 4, 2, "does not divide the 6 images of a process"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(
    batch: int, per_device: int | None, world: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        share_of(batch, per_device, Ranks(0, world))


def test_the_shares_of_all_processes_make_the_batch() -> None:
    rows = [row for rank in range(4) for row in range(32)[share_of(32, 4, Ranks(rank, 4))[0]]]
    assert rows == list(range(32))
    assert share_of(8, 100, Ranks()) == (slice(0, 8), 8)


# --- the balance of the two terms


def by_hand(one: Update, step: int = 0) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Gradient and value of each term of a step, by autograd."""
    images, labels = one.stream.images(step)
    host, device = generator(0, "test", step), generator(0, "test noise", step)
    draws: Jumps = one.objective.draw(images.shape, step, host, device)  # type: ignore[arg-type]
    terms = {term.name: term.value for term in one.objective.terms(images, labels, draws)}
    weights = list(one.model.parameters())
    found = {name: list(torch.autograd.grad(value, weights, materialize_grads=True)) for name, value in terms.items()}
    return found, terms


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_balance_is_the_weight_or_adaptive_the_ratio_of_gradient_norms_at_the_last_layer(adaptive: bool) -> None:
    one = update(adaptive=adaptive)
    gradients, values = by_hand(one)
    ratio = gradients["distillation"][one._last].norm() / (gradients["dsm"][one._last].norm() + 1e-4)
    terms, _ = one.step(0)
    assert ("dsm_balance" in terms) == adaptive
    if adaptive:
        torch.testing.assert_close(terms["dsm_balance"], ratio, rtol=1e-5, atol=0)
    weighted = 0.7 * (ratio if adaptive else 1.0)
    torch.testing.assert_close(terms["loss"], (values["distillation"] + weighted * values["dsm"]).detach())
    for weight, a, b in zip(one.model.parameters(), gradients["distillation"], gradients["dsm"], strict=True):
        torch.testing.assert_close(weight.grad, a + weighted * b, rtol=1e-5, atol=1e-7)


def test_the_balance_is_bounded() -> None:
    """Where the DSM term has no gradient at all, its weight stays finite."""
    one = update(adaptive=True, dsm_weight=1e-30)
    with torch.no_grad():
        one._parameters[one._last].zero_()
    terms, _ = one.step(0)
    assert 0 <= terms["dsm_balance"] <= 1e4


@pytest.mark.parametrize(
    ("network", "name", "at_block"),
    [
        ("ddpmpp", "aux_conv.weight", False),
        ("adm", "out_conv.weight", False),
        ("mlp", "linear_out.weight", False),
        ("ddpmpp", "dec.8x8_block1.conv1.weight", True),
        ("adm", "dec.8x8_block1.conv1.weight", True),
    ],
)
def test_the_layer_of_the_balance_is_the_output_or_ends_the_last_residual_block(
    network: str, name: str, at_block: bool
) -> None:
    teacher = init_denoiser(ARCHITECTURES[network], 0)
    for model in (teacher, student_from_teacher(teacher)):
        one = Update(model, None, None, None, at_block=at_block)  # type: ignore[arg-type]
        assert [full for full, _ in model.named_parameters()][one._last].endswith(name)


def test_the_official_adm_is_balanced_where_ctm_s_code_balances() -> None:
    """output_blocks[15][0].out_layers[3] there: of sixteen decoder blocks the last, its second convolution."""
    with torch.device("meta"):
        model = build_denoiser(official_architecture("edm-imagenet-64x64-cond-adm.pkl"))
    names = [name for name, _ in model.named_parameters()]
    one = Update(model, None, None, None, at_block=True)  # type: ignore[arg-type]
    assert names[one._last] == [name for name in names if ".dec." in name and "conv1.weight" in name][-1]
    assert "64x64_block3" in names[one._last]


def test_a_perceptron_has_no_block_to_balance_at() -> None:
    assert "is for U-Nets" in mistake(update, adaptive=True, at_block=True)


# --- precision


@pytest.mark.statistical
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_gives_nearly_the_same_step(precision: str, adaptive: bool) -> None:
    _, terms = trained(update(adaptive=adaptive), 3)
    _, low = trained(update(adaptive=adaptive, precision=precision), 3)
    for a, b in zip(low, terms, strict=True):
        assert a != b
        assert a["dsm"] == pytest.approx(b["dsm"], rel=0.05)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.1)


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_overflow_of_float16_leaves_the_step_out_and_lowers_the_scale(adaptive: bool) -> None:
    """Of both terms, whose ratio does not exist then: no bad loss, and the training goes on."""
    one = update(precision="float16", adaptive=adaptive)
    before = [weight.detach().clone() for weight in one.model.parameters()]
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    terms, _ = one.step(0)
    assert not torch.isfinite(terms.pop("grad_norm"))
    assert all(bool(torch.isfinite(value)) for value in terms.values())
    torch.testing.assert_close(list(one.model.parameters()), before, rtol=0, atol=0)
    assert one.scaler.get_scale() == 2.0**126
