"""Two compared students start from the same weights and see the same images, times and noise."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser
from consistency.stages import student as stage
from consistency.stages.trainer import Machine
from consistency.study import Study
from consistency.training.data import load_images
from consistency.training.loop import Training, train
from consistency.training.objectives import Jumps, Term

Tiny = Callable[..., Study]
CPU = Machine(torch.device("cpu"))


def training(study: Study, layout: Layout, run: str, seed: int = 0) -> Training:
    return stage._training(study, layout, run, seed, load_images(layout.dataset), CPU)


@dataclass
class Seen:
    """What the objective of a step is given."""

    images: torch.Tensor
    labels: torch.Tensor | None
    draws: Jumps


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What every step is given."""
    steps: list[Seen] = []
    whole = stage.Trajectory.terms

    def note(self: Any, images: torch.Tensor, labels: torch.Tensor | None, draws: Jumps) -> Iterator[Term]:
        steps.append(Seen(images, labels, draws))
        return whole(self, images, labels, draws)

    monkeypatch.setattr(stage.Trajectory, "terms", note)
    return steps


def test_students_of_a_seed_start_from_the_same_weights(tiny: Tiny, first_results: Layout) -> None:
    study = tiny({"students.bcm": {"preconditioning": "bcm"}})
    jobs = [training(study, first_results, run) for run in study.students]
    for job in jobs[1:]:
        for name, value in jobs[0].update.model.state_dict().items():
            assert torch.equal(job.update.model.state_dict()[name], value), name
            assert torch.equal(job.averages[0].model.state_dict()[name], value), name


def test_students_of_a_seed_see_the_same_images_times_and_noise(
    tiny: Tiny, first_results: Layout, seen: list[Seen]
) -> None:
    ctm, analytic = (training(tiny(), first_results, run).update for run in ("ctm", "analytic"))
    for step in range(4):
        ctm.step(step)
        analytic.step(step)
    for a, b in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(a.images, b.images)
        assert a.draws.steps == b.draws.steps
        for name in ("first", "to", "z", "sigma", "z_dsm"):
            assert torch.equal(getattr(a.draws, name), getattr(b.draws, name)), name
    assert not torch.equal(seen[0].images, seen[2].images)
    assert not torch.equal(seen[0].draws.z, seen[2].draws.z)


def test_another_seed_is_another_order_and_other_second_time_weights(
    tiny: Tiny, first_results: Layout, seen: list[Seen]
) -> None:
    study = tiny({"seeds": [0, 1]})
    first, second = (training(study, first_results, "ctm", seed).update for seed in (0, 1))
    weights, others = ({n: v.clone() for n, v in one.model.state_dict().items()} for one in (first, second))
    first.step(0)
    second.step(0)
    assert not torch.equal(seen[0].images, seen[1].images)
    changed = {name for name, value in weights.items() if not torch.equal(others[name], value)}
    assert changed
    assert all("_s." in name for name in changed)


def test_a_students_first_jumps_are_its_teachers(tiny: Tiny, first_results: Layout) -> None:
    from consistency.training.checkpoint import load_denoiser

    teacher, _ = load_denoiser(first_results.teacher / "teacher.safetensors")
    model = training(tiny(), first_results, "analytic").update.model
    x, t, s = torch.randn(4, 1, 8, 8), torch.full((4,), 3.0), torch.full((4,), 0.1)
    assert torch.equal(model(x, t, s), teacher(x, t))


@pytest.mark.parametrize("conditional", [True, False])
def test_labels_are_given_to_conditional_students_alone(
    tiny: Tiny,
    first_results: Layout,
    seen: list[Seen],
    make_denoiser: Callable[..., Denoiser],
    monkeypatch: pytest.MonkeyPatch,
    conditional: bool,
) -> None:
    teacher = make_denoiser(0, img_resolution=8, label_dim=10 * conditional)
    monkeypatch.setattr(stage, "read_teacher", lambda *_: teacher)
    training(tiny({"teacher.conditional": conditional}), first_results, "ctm").update.step(0)
    labels = seen[0].labels
    assert (labels is not None) == conditional
    assert labels is None or labels.shape == (16,)


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


# --- how the machine is used changes the last bits, no more


@pytest.mark.parametrize("compute", [{"channels_last": True}, {"data_on_device": True}, {"batch_per_device": 4}])
def test_compute_settings_change_the_last_bits_at_most(
    tiny: Tiny, first_results: Layout, tmp_path: Path, compute: dict[str, Any]
) -> None:
    jobs = []
    for settings in ({}, compute):
        study = tiny({"compute": settings})
        assert study.key("student", "ctm", 0) == tiny().key("student", "ctm", 0)
        layout = Layout("tiny", first_results.results, tmp_path / str(len(jobs)))
        jobs.append(training(study, layout, "ctm"))
        train(jobs[-1])
    weights = [job.averages[0].model.state_dict() for job in jobs]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_compute_the_same(tiny: Tiny, first_results: Layout) -> None:
    plain = training(tiny(), first_results, "ctm")
    compiled = training(tiny({"compute": {"compile": True}}), first_results, "ctm")
    for step in range(2):
        terms, same = (job.update.step(step)[0] for job in (plain, compiled))
        for name in terms:
            torch.testing.assert_close(same[name], terms[name], rtol=1e-4, atol=1e-6)
    assert plain.update.model.state_dict().keys() == compiled.update.model.state_dict().keys()


def test_a_lower_precision_is_that_of_all_three_networks(
    tiny: Tiny, first_results: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of them alone: what the distance compares is float32."""
    compared: list[torch.dtype] = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        compared.extend([a.dtype, b.dtype])
        return (a - b).square().flatten(1).mean(1)

    monkeypatch.setitem(stage.DISTANCES, "l2", distance)
    job = training(tiny({"student.precision": "bfloat16", "student.distance": "l2"}), first_results, "ctm")
    objective: Any = job.update.objective
    outputs: list[torch.dtype] = []
    for network in (objective.student, objective.average, objective.teacher):
        network.model.register_forward_hook(lambda module, given, output: outputs.append(output.dtype))
    job.update.step(0)
    assert set(outputs) == {torch.bfloat16}
    assert set(compared) == {torch.float32}
