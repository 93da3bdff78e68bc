"""Stage student: distil the teacher, or train without one; two students differ in what the study says, nothing else."""

import shutil
import time
from pathlib import Path

import torch

from consistency.layout import Layout
from consistency.nets.denoiser import Denoiser, init_denoiser, student_from_teacher
from consistency.provenance import digest_of, git_state, write_card
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
from consistency.stages.publish import publish_training
from consistency.stages.trainer import Machine, build_optimizer, build_update, compile_networks, place
from consistency.study import Shrinking, Student, Study
from consistency.theory.curriculum import DoublingCurriculum, Schedule, ShrinkingCurriculum
from consistency.theory.distance import DISTANCES, Distance
from consistency.tracking.live import followed
from consistency.training.checkpoint import save_denoiser
from consistency.training.consistency_training import ConsistencyTraining, TransportTraining
from consistency.training.data import ImageData
from consistency.training.ema import Ema
from consistency.training.folder import read_identity
from consistency.training.loop import Training, train
from consistency.training.objectives import Endpoint, Objective, Trajectory
from consistency.training.own_fit import Refits, covariance_fit
from consistency.training.stopwatch import Stopwatch


def make_student(study: Study, layout: Layout, run: str, seed: int, machine: Machine) -> None:
    """Write student.safetensors (EMA weights), one more file for each further EMA rate, history.jsonl, snapshots/
    and card.json.

    Resumes an interrupted training; raises Interrupted when asked to stop, UserError when it diverges.
    """
    study.require(run, seed)
    started = time.time()
    data = read_dataset(study, layout)
    job = _training(study, layout, run, seed, data, machine)
    with followed(study, layout, job.folder, run, seed) as job.on_start:
        measured = train(job)
        if machine.ranks.first:
            _publish(study, layout, run, seed, job, started, measured)
            shutil.rmtree(job.folder)


def _publish(
    study: Study, layout: Layout, run: str, seed: int, job: Training, started: float, measured: dict[str, float]
) -> None:
    """The outputs of a finished training, and its card."""
    digests = {path: digest_of(path, layout) for path in _inputs(study, layout, run, seed)}
    metadata = {"study": study.name, "stage": "student", "run": run, "seed": seed, "key": job.key, "step": job.steps}
    metadata |= {"git": git_state(), "parents": {path.name: digest for path, digest in digests.items()}}
    checkpoints = []
    for k, average in enumerate(job.averages):
        checkpoints.append(layout.student_file(run, seed, average.constant if k else None))
        save_denoiser(checkpoints[-1], average.model, {**metadata, "ema": average.constant})
    write_card(
        study,
        layout,
        "student",
        run,
        seed,
        started=started,
        inputs=digests,
        outputs=[*checkpoints, *publish_training(job.folder, layout.student(run, seed))],
        measured=measured,
        known=digests,
        downloads=downloads(study, "student", run),
        training=read_identity(job.folder),
    )


def _inputs(study: Study, layout: Layout, run: str, seed: int) -> list[Path]:
    """What a student is made from."""
    settings = study.students[run]
    inputs = [layout.teacher / "teacher.safetensors", *data_files(study, layout)]
    if settings.needs_coefficients:
        inputs.append(layout.coefficients / "coefficients.npz")
    if frozen := settings.frozen:
        inputs.append(layout.student_file(frozen.run, seed, step=frozen.step))
    return inputs


def _training(study: Study, layout: Layout, run: str, seed: int, data: ImageData, machine: Machine) -> Training:
    settings, device = study.students[run], machine.device
    teacher = place(study, read_teacher(study, layout, device), device)
    require_classes(study, data, teacher)
    student = place(study, _begun(study, settings, teacher, seed, data), device).train().requires_grad_(True)
    rates = (settings.ema_rate, *settings.evaluation_ema)
    averages = [Ema(student, rate, settings.ema_warm_up) for rate in rates]
    average = averages[0].model
    target = average
    if frozen := settings.frozen:
        target = place(study, read_student(study, layout, frozen.run, seed, device, step=frozen.step), device)
    networks = {student, average, target, teacher}
    for model in networks:
        model.compute_in(settings.precision)
    compile_networks(study, *networks)
    stopwatch = Stopwatch(device)
    update = build_update(
        study,
        data,
        machine,
        _objective(study, layout, run, machine, (student, target, teacher), stopwatch),
        student,
        batch=settings.batch,
        seed=seed,
        purpose="distillation",
        optimizer=build_optimizer(settings.optimizer, student, settings.learning_rate),
        precision=settings.precision,
        adaptive=settings.dsm_balance == "adaptive",
        stopwatch=stopwatch,
    )
    return Training(
        label=f"student {run} seed {seed}",
        key=study.key("student", run, seed),
        update=update,
        averages=averages,
        steps=settings.steps,
        log_every=settings.log_every,
        folder=layout.training_state(run, seed),
        snapshot_every=settings.snapshot_every,
        before_step=_refits(study, settings, data, machine, student, [average.model for average in averages]),
    )


def _begun(study: Study, settings: Student, teacher: Denoiser, seed: int, data: ImageData) -> Denoiser:
    """A student before its training. Weights, data order and noise depend on the seed alone, so that students of one
    seed differ in nothing else."""
    drawn = derived_seed(seed, "student")
    if settings.from_teacher:
        student = student_from_teacher(teacher, dropout=settings.dropout, seed=drawn)
    else:
        # The network of the teacher, not its weights.
        architecture = {**teacher.architecture, "dropout": settings.dropout}
        if "augment_dim" in architecture:
            architecture["augment_dim"] = 0
        student = init_denoiser(architecture, drawn)
        student = student_from_teacher(student, seed=drawn) if settings.second_time else student
    if settings.carries_fit:
        student.carry(covariance_fit(data, fitted_times(study)))
    return student


def _refits(
    study: Study, settings: Student, data: ImageData, machine: Machine, student: Denoiser, averages: list[Denoiser]
) -> Refits | None:
    """What fits a student's coefficients again in the middle of its training, if anything does."""
    if settings.fit != "average":
        return None
    fit, device = study.coefficients, machine.device
    dtype = torch.float64 if fit.precision == "float64" else torch.float32
    images, labels, noise = fitted_images(data, fit)
    return Refits(
        stage=schedule_of(study, settings).stage,
        student=student,
        averages=averages,
        images=images.to(device, dtype),
        labels=labels.to(device) if study.teacher.conditional else None,
        noise=noise.to(device, dtype),
        times=fitted_times(study),
        batch=fit.batch,
        precision=dtype,
        ranks=machine.ranks,
    )


def _objective(
    study: Study,
    layout: Layout,
    run: str,
    machine: Machine,
    models: tuple[Denoiser, Denoiser, Denoiser],
    stopwatch: Stopwatch,
) -> Objective:
    """The loss of a student; models: student, its average or the frozen predictor in its place, teacher."""
    settings = study.students[run]
    if settings.objective == "consistency":
        return consistency_objective(study, layout, run, models[:2], machine)
    preconditioning = read_preconditioning(study, layout, run, models[0])
    distance = _distance(settings, machine)
    grid = time_grid(study, settings.nodes, machine.device)
    endpoint = Endpoint(*models, preconditioning, distance, grid, settings.target, stopwatch=stopwatch)
    if settings.objective == "endpoint":
        return endpoint
    max_steps = settings.max_heun_steps or settings.nodes - 1
    return Trajectory(**vars(endpoint), max_steps=max_steps, dsm_weight=settings.dsm_weight)


def consistency_objective(
    study: Study, layout: Layout, run: str, models: tuple[Denoiser, Denoiser], machine: Machine
) -> ConsistencyTraining:
    """The loss of a student of consistency training; models: student, its average or the frozen predictor."""
    settings = study.students[run]
    training = TransportTraining if settings.coupling == "ot" else ConsistencyTraining
    return training(
        student=models[0],
        predictor=models[1],
        preconditioning=read_preconditioning(study, layout, run, models[0]),
        distance=_distance(settings, machine),
        schedule=schedule_of(study, settings),
        ends=(study.noise.sigma_min, study.noise.sigma_max),
        mu=settings.mu if settings.coupling == "gc" else 0.0,
        dsm_weight=settings.dsm_weight,
    )


def schedule_of(study: Study, settings: Student) -> Schedule:
    """The levels of consistency training."""
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
