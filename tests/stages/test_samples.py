"""Image i comes from seed i: the same in whatever batch, however many others are drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser, student_from_teacher
from consistency.seeding import ImageNoise
from consistency.stages.samples import Sampler, draw, heun_sampler, jump_sampler, make_samples, student_samplers
from consistency.study import Study
from consistency.theory.preconditioning import build_preconditioning
from consistency.training.checkpoint import save_denoiser
from consistency.training.data import to_bytes

Tiny = Callable[..., Study]
CTM = build_preconditioning("ctm", 0.5)


def images(study: Study, model: Denoiser, sampler: Sampler, count: int) -> torch.Tensor:
    return torch.cat([batch for _, batch in draw(study, model, sampler, count)])


@pytest.mark.parametrize("label_dim", [0, 10])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_latents_labels_and_fresh_noise_are_each_images_own(batch: int, label_dim: int) -> None:
    shape = (3, 4, 4)
    whole = ImageNoise(range(64), shape, label_dim)
    parts = [ImageNoise(range(i, min(i + batch, 64)), shape, label_dim) for i in range(0, 64, batch)]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    for _ in range(3):
        assert torch.equal(whole.fresh(), torch.cat([part.fresh() for part in parts]))
    if label_dim:
        assert whole.labels is not None
        assert whole.labels.tolist() == [int(label) for part in parts for label in part.labels]
    else:
        assert whole.labels is None


def test_latents_are_standard_normal_and_unlike_each_other() -> None:
    latents = ImageNoise(range(2000), (1, 4, 4)).latents.flatten(1)
    assert latents.mean().item() == pytest.approx(0, abs=0.02)
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    # Neighbouring seeds must not be correlated, in pixels or in images.
    assert (latents[:-1] * latents[1:]).mean().abs() < 0.02


def test_conditional_labels_are_uniform_and_from_the_seeds() -> None:
    labels = ImageNoise(range(2000), (1, 1, 1), 10).labels
    assert labels is not None
    assert torch.bincount(labels, minlength=10).min() > 150
    again = ImageNoise([5, 3], (1, 1, 1), 10).labels
    assert again is not None
    assert again.tolist() == [labels[5].item(), labels[3].item()]


def test_a_conditional_study_starts_from_the_same_latents() -> None:
    assert torch.equal(ImageNoise(range(4), (1, 4, 4)).latents, ImageNoise(range(4), (1, 4, 4), 10).latents)


SAMPLERS: dict[str, Callable[[Study, Denoiser], Sampler]] = {
    "heun": lambda study, model: heun_sampler(study, model),
    "nfe1": lambda study, model: jump_sampler(study, "ctm", model, CTM, 1),
    "nfe3": lambda study, model: jump_sampler(study, "ctm", model, CTM, 3),
    "gamma": lambda study, model: jump_sampler(study, "ctm", model, CTM, 3, 0.8),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("label_dim", [0, 10])
def test_images_do_not_depend_on_the_batch_nor_on_the_count(
    tiny: Tiny, make_denoiser: Callable[..., Denoiser], name: str, label_dim: int
) -> None:
    model = make_denoiser(0, label_dim=label_dim).eval()
    if name != "heun":
        model = student_from_teacher(model).eval()

    def drawn(batch: int, count: int) -> torch.Tensor:
        study = tiny({"sampling.batch": batch, "sampling.count": 80})
        return images(study, model, SAMPLERS[name](study, model), count)

    reference = drawn(64, 64)
    assert torch.isfinite(reference).all()
    for batch, count in ((1, 9), (7, 64), (64, 20), (64, 64)):
        same = drawn(batch, count)
        assert len(same) == count
        torch.testing.assert_close(same, reference[:count], rtol=1e-5, atol=1e-5)
        difference = to_bytes(same).astype(int) - to_bytes(reference[:count])
        assert np.abs(difference).max() <= 1
    assert torch.equal(drawn(64, 64), reference)


def test_a_label_changes_the_image(tiny: Tiny, make_denoiser: Callable[..., Denoiser]) -> None:
    model = make_denoiser(0, label_dim=10).eval()
    noise = ImageNoise(range(4), (1, 4, 4), 10)
    sampler = heun_sampler(tiny(), model)
    first = sampler(noise)
    assert noise.labels is not None
    noise.labels = (noise.labels + 1) % 10
    assert not torch.equal(first, sampler(noise))


def test_the_teachers_sampler_ends_with_the_denoiser_at_eps(tiny: Tiny, make_denoiser: Callable[..., Denoiser]) -> None:
    """The endpoint of the ODE at eps and the sampler differ by that last evaluation alone."""
    study, model = tiny({"sampling.teacher_steps": 6}), make_denoiser().eval()
    noise = ImageNoise(range(4), (1, 4, 4))
    with torch.inference_mode():
        endpoint = heun_sampler(study, model, 6)(noise)
        torch.testing.assert_close(heun_sampler(study, model)(noise), model(endpoint, 0.002))


def test_one_jump_is_the_consistency_function(tiny: Tiny, make_denoiser: Callable[..., Denoiser]) -> None:
    model = student_from_teacher(make_denoiser()).eval()
    noise = ImageNoise(range(4), (1, 4, 4))
    t, s = (torch.full((4,), v, dtype=torch.float64) for v in (80.0, 0.002))
    with torch.inference_mode():
        expected = CTM.jump(model, 80 * noise.latents, t, s)
        assert torch.equal(jump_sampler(tiny(), "ctm", model, CTM, 1)(noise), expected)


def test_only_trajectory_students_have_gamma_samplers(tiny: Tiny, make_denoiser: Callable[..., Denoiser]) -> None:
    model = student_from_teacher(make_denoiser()).eval()
    trajectory = tiny({"sampling.gamma": [0.5, 1.0], "sampling.gamma_nfe": [2, 4]})
    names = {"nfe1", "nfe2", "nfe5"}
    gammas = {f"gamma{g}-nfe{n}" for g in (0.5, 1.0) for n in (2, 4)}
    assert set(student_samplers(trajectory, "ctm", model, CTM)) == names | gammas
    endpoint = tiny({"student.objective": "endpoint", "report": {}})
    assert set(student_samplers(endpoint, "ctm", model, CTM)) == names


def test_the_stage_writes_every_sampler_as_bytes(tiny: Tiny, first_results: Layout, tmp_path: Path) -> None:
    study = tiny()
    make_samples(study, first_results, None, None, torch.device("cpu"))
    by_teacher = np.load(first_results.samples(None, None) / "heun.npy")
    assert by_teacher.shape == (80, 8, 8, 1)
    assert by_teacher.dtype == np.uint8
    student = student_from_teacher(_teacher(first_results))
    path = first_results.student("analytic", 0) / "student.safetensors"
    save_denoiser(path, student, {"key": study.key("student", "analytic", 0), "study": "tiny"})
    make_samples(study, first_results, "analytic", 0, torch.device("cpu"))
    folder = first_results.samples("analytic", 0)
    names = {"nfe1.npy", "nfe2.npy", "nfe5.npy", "gamma1.0-nfe2.npy", "card.json"}
    assert {entry.name for entry in folder.iterdir()} == names


def _teacher(layout: Layout) -> Denoiser:
    from consistency.training.checkpoint import load_denoiser

    return load_denoiser(layout.teacher / "teacher.safetensors")[0]
