"""A training step of the full-size studies on a device whose numbers cannot be read: PyTorch's meta device.

A host read (.item(), .cpu(), nonzero, a boolean mask) and a tensor left on the CPU fail there, as they would stall or
fail on a GPU, at the studies' real shapes and without memory. Fake CUDA tensors would be closer, but without a driver
they have no backward pass.
"""

import contextlib
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tests.training.losses import fitted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from consistency.config.job import Job
from consistency.config.networks import OfficialTeacher
from consistency.config.paths import StudyPaths
from consistency.config.reading import load_study
from consistency.config.study import Study
from consistency.nets.denoiser import Denoiser, build_denoiser
from consistency.nets.official import official_architecture
from consistency.theory.estimators import image_moments
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.preconditioning import build_preconditioning
from consistency.training.build import build_distance
from consistency.training.objective import Basis, Models
from consistency.training.stopwatch import Stopwatch
from consistency.training.teachers import architecture_of

META, CPU = torch.device("meta"), torch.device("cpu")
#: a student of each objective, network and coupling
CASES = [
    *(("cifar10-uncond", name) for name in ("ctm", "analytic-centred", "cm")),
    *(("ffhq64", "analytic"), ("imagenet64", "analytic")),
    *(
        ("cifar10-gc", "ic"),
        ("cifar10-gc", "gc"),
        ("imagenet32-gc", "gc"),
        ("celeba64-gc", "gc"),
        ("cifar10-ect", "gc-mu0.5"),
    ),
]


class HostCopies(TorchDispatchMode):
    """Fails where numbers of the host are copied to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != found.device and args[0].numel() > 1:
            raise AssertionError(f"{list(args[0].shape)} copied from {args[0].device} to {found.device}")
        return found


@pytest.fixture(autouse=True)
def _on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of VGG's weights, and no autocast, which this device does not have."""
    monkeypatch.setattr("consistency.nets.perceptual._read_convolutions", lambda slices, weights: None)
    monkeypatch.setattr("consistency.training.build.open_resource", lambda name: name)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())


def network(study: Study, second_time: bool) -> Denoiser:
    teacher = study.teacher
    known = official_architecture(teacher.checkpoint) if isinstance(teacher, OfficialTeacher) else None
    architecture = known or architecture_of(study, teacher, 10, 0.5)  # type: ignore[arg-type]
    with META:
        return build_denoiser({**architecture, "augment_dim": 0, "second_time": second_time}).eval()


def objectives(study: Study, name: str) -> tuple[Any, Any, Models]:
    """The student's loss on the device, the same on the host, which draws, and their networks."""
    job = Job(study, StudyPaths(study.name)).of(name, 0)
    settings = job.settings
    student = network(study, settings.takes_s).train().requires_grad_(True)
    ema, teacher = network(study, settings.takes_s), network(study, False)
    models = Models(student, ema.requires_grad_(False), teacher.requires_grad_(False), ema)
    found = []
    for device in (META, CPU):
        shape = (3, study.dataset.resolution, study.dataset.resolution)
        ode = fitted()
        ode = GeneralizedODE(ode.times, torch.sigmoid(ode.times.log()), ode.times * 0, device, torch.zeros(shape))
        form = build_preconditioning(settings.preconditioning, 0.5, ode, settings.theta)
        basis = Basis(models, form, build_distance(settings.distance, device), study.noise, device, Stopwatch(CPU))
        found.append(pkgutil.resolve_name(f"consistency.{settings.loss}").build(settings, basis))
    return found[0], found[1], models


def on_device(draws: Any) -> Any:
    tensors = {f.name: getattr(draws, f.name) for f in fields(draws)}
    return replace(draws, **{name: each.to(META) for name, each in tensors.items() if isinstance(each, Tensor)})


def step(study: Study, name: str) -> Iterator[Tensor]:
    """The terms of a step of what goes through a device at once."""
    loss, host, models = objectives(study, name)
    count = study.compute.batch_per_device or study.students[name].batch
    side = study.dataset.resolution
    generator = torch.Generator().manual_seed(0)
    draws = on_device(host.draw((count, 3, side, side), 0, generator, generator))
    if hasattr(draws, "steps"):
        draws = replace(draws, steps=2)  # each further teacher step is another of the same
    images = torch.empty(count, 3, side, side, device=META)
    labels = torch.empty(count, dtype=torch.int64, device=META) if study.teacher.conditional else None
    with HostCopies():
        for term in loss.terms(images, labels, draws):
            term.value.backward()
            yield term.value
    assert all(weight.grad is not None for weight in models.student.parameters() if weight.requires_grad)


@pytest.mark.parametrize(("name", "student"), CASES)
def test_a_step_reads_nothing_back_and_leaves_nothing_on_the_host(name: str, student: str) -> None:
    study = load_study(f"config/studies/{name}.yaml")
    values = list(step(study, student))
    assert values and all(value.device == META and value.shape == () for value in values)


@pytest.mark.parametrize("name", ["cifar10-uncond", "imagenet64"])
def test_the_fits_moments_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(f"config/studies/{name}.yaml")
    teacher, side = network(study, False), study.dataset.resolution
    x = torch.empty(2, 3, side, side, device=META)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape, dtype=self.dtype))  # at their end
    assert image_moments(lambda x, t: teacher(x, t), x, 1.0, torch.ones_like(x)[None], x[0]).shape == (9, 2)


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda x: x * x.mean().item(), "item"),
        (lambda x: x + torch.ones(x.shape), "device"),
        (lambda x: x[x > 0].sum() + x, "meta|nonzero"),
        (lambda x: x * torch.tensor([1.0, 2.0]).to(x.device).sum(), "copied from cpu to meta"),
    ],
)
def test_what_would_stall_or_fail_on_a_gpu_is_found(
    planted: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Denoiser.raw
    monkeypatch.setattr(Denoiser, "raw", lambda self, *args, **kwargs: planted(raw(self, *args, **kwargs)))
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match=message):
        list(step(load_study("config/studies/cifar10-gc.yaml"), "ic"))
