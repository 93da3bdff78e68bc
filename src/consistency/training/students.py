"""The training of a student: its first weights, its objective, its refits."""

import torch

from consistency.base.seeding import derived_seed
from consistency.config.job import Job
from consistency.config.student import Shrinking, Student
from consistency.config.study import Study
from consistency.data.prepared import ImageData
from consistency.data.resources import VGG16, open_resource
from consistency.nets.denoiser import Denoiser, init_denoiser, student_from_teacher
from consistency.provenance.inputs import read_preconditioning, read_student, read_teacher, require_classes
from consistency.runtime.machine import Machine
from consistency.theory.curriculum import DoublingCurriculum, Schedule, ShrinkingCurriculum
from consistency.theory.distance import DISTANCES, Distance
from consistency.training.build import Stream, build_update, compile_networks, place
from consistency.training.consistency_training import ConsistencyTraining, TransportTraining
from consistency.training.ema import Ema
from consistency.training.endpoint import Endpoint
from consistency.training.fits import fitted_images, fitted_times, time_grid
from consistency.training.loop import Training
from consistency.training.objective import Objective
from consistency.training.own_fit import Refits, covariance_fit
from consistency.training.stopwatch import Stopwatch
from consistency.training.trajectory import Trajectory


def student_training(job: Job, data: ImageData, machine: Machine) -> Training:
    assert job.seed is not None
    study, settings, device = job.study, job.settings, machine.device
    teacher = place(study, read_teacher(job, device), device)
    require_classes(study, data, teacher)
    student = place(study, _begun(job, teacher, data), device).train().requires_grad_(True)
    averages = [Ema(student, rate or settings.ema_rate, settings.ema_warm_up) for rate in settings.rates]
    average = averages[0].model
    target = place(study, frozen_predictor(job, device) or average, device)
    networks = {student, average, target, teacher}
    for model in networks:
        model.compute_in(settings.precision)
    compile_networks(study, *networks)
    stopwatch = Stopwatch(device)
    objective = _objective(job, machine, (student, target, teacher), stopwatch)
    update = build_update(
        study,
        data,
        machine,
        objective,
        student,
        (settings.optimizer, settings.learning_rate),
        Stream(settings.batch, job.seed, "distillation"),
        precision=settings.precision,
        adaptive=settings.dsm_balance == "adaptive",
        stopwatch=stopwatch,
    )
    return Training(
        label=f"student {job.label}",
        key=job.key("student"),
        update=update,
        averages=averages,
        steps=settings.steps,
        log_every=settings.log_every,
        folder=job.state,
        snapshot_every=settings.snapshot_every,
        before_step=_refits(job, data, machine, student, [average.model for average in averages]),
    )


def frozen_predictor(job: Job, device: torch.device) -> Denoiser | None:
    """Return the student that makes gc's endpoints instead of the average, None without one."""
    if job.predictor is None or job.settings.frozen is None:
        return None
    return read_student(job.predictor, device, step=job.settings.frozen.step)


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


def _refits(job: Job, data: ImageData, machine: Machine, student: Denoiser, averages: list[Denoiser]) -> Refits | None:
    """Return the refits of a student's coefficients during its training, None if there are none."""
    if job.settings.fit != "average":
        return None
    images, labels, noise = fitted_images(job.study, data, machine.device)
    return Refits(
        stage=schedule_of(job.study, job.settings).stage,
        student=student,
        averages=averages,
        images=images,
        labels=labels,
        noise=noise,
        times=fitted_times(job.study),
        batch=job.study.coefficients.batch,
        ranks=machine.ranks,
    )


def _objective(
    job: Job, machine: Machine, models: tuple[Denoiser, Denoiser, Denoiser], stopwatch: Stopwatch
) -> Objective:
    """Build the loss of a student; models: student, its average or the frozen predictor in its place, teacher."""
    settings = job.settings
    if settings.objective == "consistency":
        return consistency_objective(job, models[:2], machine)
    preconditioning = read_preconditioning(job, models[0])
    distance = _distance(settings, machine)
    grid = time_grid(job.study, settings.nodes, machine.device)
    shared = (*models, preconditioning, distance, grid, settings.target)
    if settings.objective == "endpoint":
        return Endpoint(*shared, stopwatch=stopwatch)
    max_steps = settings.max_heun_steps or settings.nodes - 1
    return Trajectory(*shared, max_steps, settings.dsm_weight, stopwatch=stopwatch)


def consistency_objective(job: Job, models: tuple[Denoiser, Denoiser], machine: Machine) -> ConsistencyTraining:
    """Build the loss of consistency training; models: student, its average or the frozen predictor."""
    settings, noise = job.settings, job.study.noise
    training = TransportTraining if settings.coupling == "ot" else ConsistencyTraining
    return training(
        student=models[0],
        predictor=models[1],
        preconditioning=read_preconditioning(job, models[0]),
        distance=_distance(settings, machine),
        schedule=schedule_of(job.study, settings),
        ends=(noise.sigma_min, noise.sigma_max),
        mu=settings.mu if settings.coupling == "gc" else 0.0,
        dsm_weight=settings.dsm_weight,
    )


def schedule_of(study: Study, settings: Student) -> Schedule:
    """Return the schedule of the levels of consistency training."""
    noise, levels = study.noise, settings.curriculum
    given = levels.model_dump(exclude={"kind", "p_mean", "p_std"})
    given |= {"sigma_min": noise.sigma_min, "sigma_max": noise.sigma_max, "mean": levels.p_mean, "std": levels.p_std}
    if isinstance(levels, Shrinking):
        return ShrinkingCurriculum(**given)
    return DoublingCurriculum(steps=settings.steps, rho=noise.rho, **given)


def _distance(settings: Student, machine: Machine) -> Distance:
    if settings.distance != "lpips":
        return DISTANCES[settings.distance]
    from consistency.nets.perceptual import PerceptualDistance

    return PerceptualDistance(open_resource(VGG16)).to(machine.device)
