"""Preconditioning, second time, labels, derivatives and description of the denoiser."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.nets.small import ARCHITECTURES, batch, make
from torch import Tensor

from consistency.nets.denoiser import Denoiser, build_denoiser, edm_coefficients, init_denoiser, student_from_teacher

Drawn = Callable[..., tuple[Denoiser, Tensor, Tensor]]
TINY_MLP = {"network": "mlp", "img_resolution": 1, "img_channels": 2, "width": 8, "depth": 1, "embedding": 8}


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One architecture of each kind."""
    return dict(ARCHITECTURES[request.param])


@pytest.fixture
def drawn(architecture: dict[str, Any]) -> Drawn:
    """drawn(label_dim=3): a denoiser of each kind, noisy images and times that fit it."""

    def draw(n: int = 3, **changes: Any) -> tuple[Denoiser, Tensor, Tensor]:
        denoiser = make(architecture, **changes)
        return denoiser, *batch(denoiser, n)

    return draw


def test_coefficients_at_t_equal_to_sigma_data() -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = (c.item() for c in edm_coefficients(half, 0.5))
    assert c_skip == pytest.approx(0.5)
    assert c_out == pytest.approx(0.5 / math.sqrt(2))
    assert c_in == pytest.approx(math.sqrt(2))
    assert c_noise == pytest.approx(math.log(0.5) / 4)


def test_coefficients_keep_input_and_target_at_unit_variance() -> None:
    t, sd = torch.logspace(-3, 2, 20, dtype=torch.float64), 0.7
    c_skip, c_out, c_in, _ = edm_coefficients(t, sd)
    torch.testing.assert_close(c_in**2 * (sd**2 + t**2), torch.ones_like(t))
    torch.testing.assert_close(((1 - c_skip) ** 2 * sd**2 + c_skip**2 * t**2) / c_out**2, torch.ones_like(t))


def test_forward_combines_the_raw_output(drawn: Drawn) -> None:
    denoiser, x, t = drawn(sigma_data=0.8)
    c_skip, c_out, _, _ = edm_coefficients(t[:, None, None, None], 0.8)
    torch.testing.assert_close(denoiser(x, t), c_skip * x + c_out * denoiser.raw(x, t))


def test_raw_feeds_the_network_scaled_images_and_log_times(drawn: Drawn) -> None:
    denoiser, x, t = drawn(second_time=True)
    c_in, c_noise = edm_coefficients(t, 0.5)[2:]
    expected = denoiser.model(c_in[:, None, None, None] * x, c_noise, second_noise_labels=(t / 2).log() / 4)
    torch.testing.assert_close(denoiser.raw(x, t, t / 2), expected)


def test_number_scalar_and_vector_times_agree(drawn: Drawn) -> None:
    denoiser, x, _ = drawn(second_time=True)
    vector = denoiser(x, torch.full([3], 1.7), torch.full([3], 0.2))
    torch.testing.assert_close(denoiser(x, 1.7, 0.2), vector)
    torch.testing.assert_close(denoiser(x, torch.tensor(1.7), torch.tensor([0.2])), vector)


def test_samples_do_not_mix(drawn: Drawn) -> None:
    denoiser, x, t = drawn()
    torch.testing.assert_close(denoiser(x, t)[1:2], denoiser(x[1:2], t[1:2]))


# --- the second time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_dim", [0, 3])
def test_student_starts_exactly_as_its_teacher(drawn: Drawn, label_dim: int) -> None:
    teacher, x, t = drawn(label_dim=label_dim)
    student = student_from_teacher(teacher, seed=5).eval()
    s = t * torch.rand(3)
    labels = torch.tensor([0, 2, 1]) if label_dim else None
    assert torch.equal(student(x, t, s, labels), teacher(x, t, labels=labels))
    assert torch.equal(student.raw(x, t, s, labels), teacher.raw(x, t, labels=labels))


def test_s_acts_after_one_step_and_gradients_reach_all_its_parameters(drawn: Drawn) -> None:
    teacher, x, t = drawn()
    student = student_from_teacher(teacher, dropout=0.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    (student(x, t, t / 2) - x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(student(x, t, t / 2), student(x, t, t / 20))
    optimizer.zero_grad()
    (student(x, t, t / 2) - x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


def test_student_without_s_uses_t(drawn: Drawn) -> None:
    student, x, t = drawn(second_time=True)
    assert torch.equal(student(x, t), student(x, t, t))
    assert not torch.equal(student(x, t), student(x, t, t / 3))


def test_student_is_a_function_of_its_seed(architecture: dict[str, Any]) -> None:
    teacher = make(architecture)
    first, again, other = (student_from_teacher(teacher, seed=seed).state_dict() for seed in (1, 1, 2))
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert {key.rpartition(".")[0] for key in changed} == {f"model.map_layer{i}_s" for i in (0, 1)}


def test_student_takes_dropout_precision_and_no_augmentation() -> None:
    teacher = init_denoiser({**ARCHITECTURES["ddpmpp"], "augment_dim": 9, "dropout": 0.2}, seed=0).double()
    kept, changed = student_from_teacher(teacher), student_from_teacher(teacher, dropout=0.0)
    assert (kept.architecture["dropout"], changed.architecture["dropout"]) == (0.2, 0.0)
    assert kept.architecture["augment_dim"] == 0 and "model.map_augment.weight" not in kept.state_dict()
    assert next(kept.parameters()).dtype == torch.float64
    assert kept.takes_s and not teacher.takes_s


def test_student_of_a_student_is_an_error() -> None:
    student = student_from_teacher(init_denoiser(TINY_MLP, 0))
    with pytest.raises(ValueError, match="already has a second time"):
        student_from_teacher(student)


# --- labels ----------------------------------------------------------------------------------------------


def test_class_changes_the_output(drawn: Drawn) -> None:
    denoiser, x, t = drawn(label_dim=3)
    by_class = [denoiser(x, t, labels=torch.full([3], c)) for c in range(3)]
    assert (by_class[0] - by_class[1]).abs().max() > 1e-4
    mixed = denoiser(x, t, labels=torch.tensor([2, 0, 1]))
    torch.testing.assert_close(mixed[0], by_class[2][0])


def test_indices_equal_one_hot_and_none_equals_zeros(drawn: Drawn) -> None:
    denoiser, x, t = drawn(label_dim=3)
    indices = torch.tensor([2, 0, 1])
    assert torch.equal(denoiser(x, t, labels=indices), denoiser(x, t, labels=torch.eye(3)[indices]))
    torch.testing.assert_close(denoiser(x, t), denoiser(x, t, labels=torch.zeros(3, 3)))


@pytest.mark.parametrize(
    ("label_dim", "labels", "message"),
    [
        (3, torch.tensor([0, 3, 1]), "from 0 to 2"),
        (3, torch.tensor([0, -1, 1]), "from 0 to 2"),
        (3, torch.tensor([0, 1]), r"int64 \[2|\[2, 3\]"),
        (3, torch.zeros(3, 4), r"one-hot \[3, 3\]"),
        (0, torch.tensor([0, 0, 0]), "unconditional"),
    ],
)
def test_labels_that_do_not_fit_are_errors(label_dim: int, labels: Tensor, message: str) -> None:
    denoiser = init_denoiser({**TINY_MLP, "label_dim": label_dim}, 0)
    with pytest.raises(ValueError, match=message):
        denoiser(torch.zeros(3, 2, 1, 1), 1.0, labels=labels)


# --- precision and derivatives ---------------------------------------------------------------------------


def test_double_denoiser_is_double_throughout(drawn: Drawn) -> None:
    denoiser, x, t = drawn(second_time=True)
    single = denoiser(x, t, t / 2)
    double = denoiser.double()
    exact = double(x.double(), t.double(), t.double() / 2)
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, atol=2e-4, rtol=1e-3)
    # A change far below float32's resolution is seen only if nothing on the way is rounded to it.
    nudged = double(x.double() * (1 + 1e-11), t.double(), t.double() / 2)
    assert 0 < (nudged - exact).abs().max() < 1e-6


def test_half_precision_input_is_computed_in_float32() -> None:
    denoiser = init_denoiser(TINY_MLP, 0)
    x = torch.randn(3, 2, 1, 1, dtype=torch.bfloat16)
    assert torch.equal(denoiser(x, 1.0), denoiser(x.float(), 1.0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_network_in_half_precision_is_close_and_gives_float32(
    drawn: Drawn, precision: str, tolerance: float, layout: torch.memory_format
) -> None:
    student, x, t = drawn(n=8, second_time=True, label_dim=3)
    labels = torch.arange(8) % 3
    exact, exact_raw = student(x, t, t / 2, labels), student.raw(x, t, t / 2, labels)
    student.to(memory_format=layout).compute_in(precision)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=layout)
    raw, out = student.raw(x, t, t / 2, labels), student(x, t, t / 2, labels)
    assert raw.dtype == out.dtype == torch.float32
    assert 0 < (raw - exact_raw).norm() < tolerance * exact_raw.norm()
    torch.testing.assert_close(out, exact, atol=0.1, rtol=0.02)
    out.square().mean().backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)


def test_forward_mode_derivative_is_the_same_in_channels_last(drawn: Drawn) -> None:
    denoiser, x, t = drawn()
    expected = torch.func.jvp(denoiser, (x, t), (x, t))[1]
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.func.jvp(denoiser, (x, t), (x, t))[1], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("second_time", [False, True])
def test_forward_mode_derivative_against_finite_differences(drawn: Drawn, second_time: bool) -> None:
    denoiser, x, t = (value.double() for value in drawn(second_time=second_time))
    v_x, v_t = torch.randn_like(x), -t

    def along(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, t / 2) if second_time else denoiser(x, t)

    derivative = torch.func.jvp(along, (x, t), (v_x, v_t))[1]
    with torch.no_grad():
        h = 1e-5
        narrow, wide = (
            (along(x + k * v_x, t + k * v_t) - along(x - k * v_x, t - k * v_t)) / (2 * k) for k in (h, 2 * h)
        )
        # Of fourth order: Fourier features of t bend so much that the central difference alone is off by 1e-6.
        difference = (4 * narrow - wide) / 3
    torch.testing.assert_close(derivative, difference, atol=1e-6, rtol=1e-5)
    assert derivative.abs().max() > 1e-2


# --- description -----------------------------------------------------------------------------------------


def test_architecture_rebuilds_the_denoiser(drawn: Drawn, architecture: dict[str, Any]) -> None:
    denoiser, x, t = drawn(label_dim=3, second_time=True, sigma_data=0.4)
    stored = json.loads(json.dumps(denoiser.architecture))
    again = build_denoiser(stored).eval()
    again.load_state_dict(denoiser.state_dict())
    assert torch.equal(again(x, t, t / 2), denoiser(x, t, t / 2))
    assert again.architecture == denoiser.architecture == stored
    assert (again.label_dim, again.sigma_data, again.takes_s) == (3, 0.4, True)
    for name in ("img_channels", "img_resolution"):
        assert getattr(again, name) == architecture[name]


def test_initial_weights_depend_on_the_seed_alone(architecture: dict[str, Any]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = init_denoiser(architecture, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    again, other = (init_denoiser(architecture, seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (TINY_MLP | {"network": "songnet"}, "unknown network 'songnet'; did you mean 'songunet'"),
        (TINY_MLP | {"network": "transformer"}, "there are songunet, adm, mlp"),
        (TINY_MLP | {"widht": 8}, "unknown key 'widht' in a mlp architecture; did you mean 'width'"),
        (TINY_MLP | {"sigma": 0.5}, "did you mean 'sigma_data'"),
        ({"network": "mlp"}, "lacks img_resolution, img_channels"),
    ],
)
def test_an_unknown_or_missing_name_is_an_error(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_denoiser(architecture)


def test_to_a_network_without_a_second_time_s_makes_no_difference(drawn: Drawn) -> None:
    teacher, x, t = drawn()
    for call in (teacher, teacher.raw):
        assert torch.equal(call(x, t, t / 2), call(x, t))


def test_wrong_number_of_times_is_an_error() -> None:
    with pytest.raises(ValueError, match="t must have 1 or 3 values"):
        init_denoiser(TINY_MLP, 0)(torch.zeros(3, 2, 1, 1), torch.ones(2))


@pytest.mark.parametrize(("condition", "message"), [("labels", "label_dim"), ("augment_labels", "augment_dim")])
def test_condition_the_network_lacks_is_an_error(drawn: Drawn, condition: str, message: str) -> None:
    denoiser, x, t = drawn()
    with pytest.raises(ValueError, match=message):
        denoiser(x, t, **{condition: torch.zeros(1)})
