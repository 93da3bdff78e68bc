"""Two compared students start from the same weights and see the same images, times and noise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.stages import student as stage
from consistency.study import Study
from consistency.training.loop import Training
from consistency.training.objectives import Losses

Tiny = Callable[..., Study]
CPU = torch.device("cpu")


def training(study: Study, layout: Layout, run: str, seed: int = 0) -> Training:
    return stage._training(study, layout, run, seed, CPU)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the objective of every step is given: images, labels, the generator's next number."""
    seen: list[tuple[Any, ...]] = []

    def note(self: Any, images: torch.Tensor, labels: torch.Tensor | None, draws: torch.Generator) -> Losses:
        seen.append((images, labels, torch.rand(1, generator=draws)))
        return Losses({"loss": torch.zeros(())}, 0)

    monkeypatch.setattr(stage.Trajectory, "__call__", note)
    return seen


def test_students_of_a_seed_start_from_the_same_weights(tiny: Tiny, first_results: Layout) -> None:
    study = tiny({"students.bcm": {"preconditioning": "bcm"}})
    jobs = [training(study, first_results, run) for run in study.students]
    for job in jobs[1:]:
        for name, value in jobs[0].model.state_dict().items():
            assert torch.equal(job.model.state_dict()[name], value), name
            assert torch.equal(job.average.model.state_dict()[name], value), name


def test_students_of_a_seed_see_the_same_images_in_the_same_order(
    tiny: Tiny, first_results: Layout, batches: list[tuple[Any, ...]]
) -> None:
    ctm, analytic = (training(tiny(), first_results, run) for run in ("ctm", "analytic"))
    for step in range(4):
        ctm.loss(step)
        analytic.loss(step)
    for a, b in zip(batches[::2], batches[1::2], strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[2], b[2])
    assert not torch.equal(batches[0][0], batches[2][0])


def test_another_seed_is_another_order_and_other_second_time_weights(
    tiny: Tiny, first_results: Layout, batches: list[tuple[Any, ...]]
) -> None:
    study = tiny({"seeds": [0, 1]})
    first, second = (training(study, first_results, "ctm", seed) for seed in (0, 1))
    first.loss(0)
    second.loss(0)
    assert not torch.equal(batches[0][0], batches[1][0])
    changed = {n for n, v in first.model.state_dict().items() if not torch.equal(second.model.state_dict()[n], v)}
    assert changed
    assert all("_s." in name for name in changed)


def test_a_students_first_jumps_are_its_teachers(tiny: Tiny, first_results: Layout) -> None:
    from consistency.training.checkpoint import load_denoiser

    teacher, _ = load_denoiser(first_results.teacher / "teacher.safetensors")
    model = training(tiny(), first_results, "analytic").model
    x, t, s = torch.randn(4, 1, 8, 8), torch.full((4,), 3.0), torch.full((4,), 0.1)
    assert torch.equal(model(x, t, s), teacher(x, t))


@pytest.mark.parametrize("conditional", [True, False])
def test_labels_are_given_to_conditional_students_alone(
    tiny: Tiny,
    first_results: Layout,
    batches: list[tuple[Any, ...]],
    make_denoiser: Callable[..., Denoiser],
    monkeypatch: pytest.MonkeyPatch,
    conditional: bool,
) -> None:
    teacher = make_denoiser(0, img_resolution=8, label_dim=10 * conditional)
    monkeypatch.setattr(stage, "read_teacher", lambda *_: teacher)
    training(tiny({"teacher.conditional": conditional}), first_results, "ctm").loss(0)
    labels = batches[0][1]
    assert (labels.shape == (16,)) if conditional else (labels is None)


def test_a_seed_the_study_has_not_is_refused(tiny: Tiny, first_results: Layout) -> None:
    with pytest.raises(UserError, match=r"study tiny has no seed 7; its seeds are \[0\]"):
        stage.make_student(tiny(), first_results, "ctm", 7, CPU)


def test_coefficients_of_other_settings_are_refused(tiny: Tiny, first_results: Layout) -> None:
    study = tiny({"coefficients.times": 17})
    with pytest.raises(UserError, match=r"made by study 'tiny' with other settings \(coefficients.times: there 16"):
        training(study, first_results, "analytic")
    training(study, first_results, "ctm")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy leaves a damaged archive open
def test_coefficients_that_are_damaged_are_refused(tiny: Tiny, first_results: Layout) -> None:
    path = first_results.coefficients / "coefficients.npz"
    content = path.read_bytes()
    try:
        for keep in (0, 3, 100, len(content) - 30):
            path.write_bytes(content[:keep])
            with pytest.raises(UserError, match=r"is damaged .*: run `coefficients` again"):
                training(tiny(), first_results, "analytic")
    finally:
        path.write_bytes(content)
