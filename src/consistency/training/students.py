"""The training of a student: its networks, its objective, its refits."""

import math
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from consistency.base.seeding import derived_seed
from consistency.config.job import Job
from consistency.config.objectives import Consistency
from consistency.config.student import Student
from consistency.data.prepared import ImageData
from consistency.nets.denoiser import Denoiser, init_denoiser, student_from_teacher
from consistency.nets.jumps import JUMPS
from consistency.provenance.inputs import (
    jumps_of,
    read_preconditioning,
    read_student,
    read_teacher,
    require_classes,
)
from consistency.runtime.machine import Machine
from consistency.training.build import build_distance, build_optimizer, compile_networks, open_stream, place
from consistency.training.consistency_training import schedule_of
from consistency.training.ema import Ema
from consistency.training.fits import fitted_images, fitted_times
from consistency.training.loop import Training
from consistency.training.objective import Basis, Models
from consistency.training.own_fit import Refits, covariance_fit
from consistency.training.stopwatch import Stopwatch
from consistency.training.update import Update


def student_training(job: Job, data: ImageData, machine: Machine) -> Training:
    assert job.seed is not None
    study, settings, device = job.study, job.settings, machine.device
    teacher = place(study.compute, read_teacher(job, device), device)
    require_classes(study, data, teacher)
    student = place(study.compute, _begun(job, teacher, data), device).train().requires_grad_(True)
    emas = [Ema(student, rate or settings.ema_rate, settings.ema_warm_up) for rate in settings.rates]
    models = Models(student, emas[0].model, teacher, predictor_of(job, emas[0].model, device))
    networks = set(vars(models).values())
    for model in networks:
        model.compute_in(settings.precision)
    compile_networks(study.compute, *networks)
    stopwatch = Stopwatch(device)
    update = Update(
        student,
        build_optimizer(settings.optimizer, settings.learning_rate, student),
        build_objective(job, models, device, stopwatch),
        open_stream(study, data, machine, settings.batch, job.seed, "distillation"),
        adaptive=settings.balance != "fixed",
        at_block=settings.balance == "adaptive-block",
        ranks=machine.ranks,
        stopwatch=stopwatch,
        scaler=torch.amp.GradScaler(device.type, enabled=settings.precision == "float16"),
    )
    return Training(
        label=f"student {job.label}",
        key=job.key("student"),
        update=update,
        emas=emas,
        steps=settings.steps,
        log_every=settings.log_every,
        folder=job.state,
        learning_rate=rate_of(settings),
        snapshot_every=settings.snapshot_every,
        before_step=_refits(job, data, machine, student, [ema.model for ema in emas]),
        metadata={JUMPS: jumps_of(job, data).model_dump(mode="json")},
    )


def rate_of(settings: Student) -> Callable[[int], float] | None:
    """Return the learning rate of a step (from 0), None for a constant one."""
    if settings.learning_rate_decay == "none":
        return None
    return lambda step: 0.5 * settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps))


def build_objective(job: Job, models: Models, device: torch.device, stopwatch: Stopwatch | None = None) -> Any:
    """Build the loss that the student's objective names."""
    settings = job.settings
    preconditioning, distance = read_preconditioning(job, models.student), build_distance(settings.distance, device)
    basis = Basis(models, preconditioning, distance, job.study.noise, device, stopwatch or Stopwatch(device))
    return pkgutil.resolve_name(f"consistency.{settings.loss}").build(settings, basis)


def predictor_of(job: Job, ema: Denoiser, device: torch.device) -> Denoiser:
    """Return the network that makes gc's endpoints: a frozen earlier student's if the student names one, else `ema`."""
    if job.predictor is None or job.settings.frozen is None:
        return ema
    return place(job.study.compute, read_student(job.predictor, device, step=job.settings.frozen.step), device)


def _begun(job: Job, teacher: Denoiser, data: ImageData) -> Denoiser:
    """Return a student before its training. Weights, data order and noise depend on the seed alone, so that students of
    one seed differ in nothing else."""
    assert job.seed is not None
    settings, drawn = job.settings, derived_seed(job.seed, "student")
    if settings.from_teacher:
        student = student_from_teacher(teacher, dropout=settings.dropout, seed=drawn)
    else:
        # The teacher's architecture, not its weights.
        architecture = {**teacher.architecture, "dropout": settings.dropout}
        if "augment_dim" in architecture:
            architecture["augment_dim"] = 0
        student = init_denoiser(architecture, drawn)
        student = student_from_teacher(student, seed=drawn) if settings.takes_s else student
    if settings.has_own_fit:
        student.set_own_fit(covariance_fit(data, fitted_times(job.study)))
    return student


def _refits(job: Job, data: ImageData, machine: Machine, student: Denoiser, emas: list[Denoiser]) -> Refits | None:
    """Return the refits of a student's coefficients during its training, None if there are none."""
    if not isinstance(job.settings, Consistency) or not job.settings.refits:
        return None
    images, labels, noise = fitted_images(job.study, data, machine.device)
    return Refits(
        stage=schedule_of(job.settings, job.study.noise).stage,
        student=student,
        emas=emas,
        images=images,
        labels=labels,
        noise=noise,
        times=fitted_times(job.study),
        batch=job.study.coefficients.batch,
        ranks=machine.ranks,
    )
