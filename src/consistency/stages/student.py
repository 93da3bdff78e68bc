"""Stage student: distil the teacher, or train without one. Students differ only in the keys that the study declares."""

import shutil
from pathlib import Path

import torch

from consistency.job import Job
from consistency.nets.denoiser import Denoiser, init_denoiser, student_from_teacher
from consistency.provenance import Card, digest_of, git_state
from consistency.resources import VGG16, downloads, open_resource
from consistency.seeding import derived_seed
from consistency.stages.coefficients import fitted_images, fitted_times
from consistency.stages.inputs import (
    data_files,
    read_dataset,
    read_preconditioning,
    read_student,
    read_teacher,
    require_classes,
    time_grid,
)
from consistency.stages.trainer import Machine, Stream, build_update, compile_networks, place
from consistency.study import Shrinking, Student, Study
from consistency.theory.curriculum import DoublingCurriculum, Schedule, ShrinkingCurriculum
from consistency.theory.distance import DISTANCES, Distance
from consistency.tracking.live import followed
from consistency.training.checkpoint import save_denoiser
from consistency.training.consistency_training import ConsistencyTraining, TransportTraining
from consistency.training.data import ImageData
from consistency.training.ema import Ema
from consistency.training.folder import publish_training, read_identity
from consistency.training.loop import Training, train
from consistency.training.objectives import Endpoint, Objective, Trajectory
from consistency.training.own_fit import Refits, covariance_fit
from consistency.training.stopwatch import Stopwatch


def make_student(job: Job, machine: Machine) -> None:
    """Write student.safetensors (EMA weights), one more file for each further EMA rate, history.jsonl, snapshots/
    and card.json.

    Resumes an interrupted training; raises Interrupted when asked to stop, UserError when it diverges.
    """
    card = Card(job, "student")
    training = student_training(job, read_dataset(job), machine)
    with followed(job, training.folder) as start:
        measured = train(training, start)
        if machine.ranks.first:
            _publish(card, training, measured)
            shutil.rmtree(training.folder)


def _publish(card: Card, training: Training, measured: dict[str, float]) -> None:
    """Write the outputs of a finished training, and its card."""
    job = card.job
    digests = {path: digest_of(path, job.paths) for path in _inputs(job)}
    metadata = {"study": job.study.name, "stage": "student", "run": job.run, "seed": job.seed, "key": training.key}
    parents = {path.name: digest for path, digest in digests.items()}
    made = {"step": training.steps, "git": git_state(), "parents": parents}
    checkpoints = [job.weights(rate) for rate in job.student.rates]
    for path, average in zip(checkpoints, training.averages, strict=True):
        save_denoiser(path, average.model, {**metadata, **made, "ema": average.constant})
    card.write(
        digests,
        [*checkpoints, *publish_training(training.folder, job.folder)],
        measured=measured,
        known=digests,
        downloads=downloads(job, "student"),
        training=read_identity(training.folder),
    )


def _inputs(job: Job) -> list[Path]:
    """Return the files that a student is made from."""
    inputs = [job.paths.teacher / "teacher.safetensors", *data_files(job)]
    if job.student.needs_coefficients:
        inputs.append(job.paths.coefficients / "coefficients.npz")
    return [*inputs, job.predictor] if job.predictor else inputs


def student_training(job: Job, data: ImageData, machine: Machine) -> Training:
    assert job.seed is not None
    study, settings, device = job.study, job.student, machine.device
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
    frozen = job.student.frozen
    return read_student(job.of(frozen.run, job.seed), device, step=frozen.step) if frozen else None


def _begun(job: Job, teacher: Denoiser, data: ImageData) -> Denoiser:
    """Return a student before its training. Weights, data order and noise depend on the seed alone, so that students of
    one seed differ in nothing else."""
    assert job.seed is not None
    settings, drawn = job.student, derived_seed(job.seed, "student")
    if settings.from_teacher:
        student = student_from_teacher(teacher, dropout=settings.dropout, seed=drawn)
    else:
        # The teacher's architecture, not its weights.
        architecture = {**teacher.architecture, "dropout": settings.dropout}
        if "augment_dim" in architecture:
            architecture["augment_dim"] = 0
        student = init_denoiser(architecture, drawn)
        student = student_from_teacher(student, seed=drawn) if settings.second_time else student
    if settings.carries_fit:
        student.carry(covariance_fit(data, fitted_times(job.study)))
    return student


def _refits(job: Job, data: ImageData, machine: Machine, student: Denoiser, averages: list[Denoiser]) -> Refits | None:
    """Return the refits of a student's coefficients during its training, None if there are none."""
    if job.student.fit != "average":
        return None
    images, labels, noise = fitted_images(job.study, data, machine.device)
    return Refits(
        stage=schedule_of(job.study, job.student).stage,
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
    settings = job.student
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
    settings, noise = job.student, job.study.noise
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
    from consistency.nets.perceptual import PerceptualDistance  # it loads torchvision

    return PerceptualDistance(open_resource(VGG16)).to(machine.device)
