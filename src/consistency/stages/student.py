"""Stage student: distil the teacher, with the preconditioning as the only difference between two students."""

import time
from collections.abc import Callable

import torch

from consistency.files import sha256
from consistency.layout import Layout
from consistency.nets.denoiser import student_from_teacher
from consistency.provenance import git_state, write_card
from consistency.seeding import derived_seed, generator
from consistency.stages.inputs import read_dataset, read_preconditioning, read_teacher, time_grid
from consistency.stages.publish import forget_state, publish_training
from consistency.study import FITTED, Study
from consistency.theory.distance import DISTANCES
from consistency.training.checkpoint import save_denoiser
from consistency.training.ema import Ema
from consistency.training.loop import Training, train
from consistency.training.objectives import Endpoint, Losses, Objective, Trajectory

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}


def make_student(study: Study, layout: Layout, run: str, seed: int, device: torch.device) -> None:
    """Write student.safetensors (EMA weights), history.jsonl, snapshots/ and card.json.

    Resumes an interrupted training; raises Interrupted when asked to stop, UserError when it diverges.
    """
    study.require(run, seed)
    started = time.time()
    folder = layout.student(run, seed)
    job = _training(study, layout, run, seed, device)
    measured = train(job)
    inputs = [layout.teacher / "teacher.safetensors", layout.dataset / "images.npy"]
    if study.resolved(run).preconditioning in FITTED:
        inputs.append(layout.coefficients / "coefficients.npz")
    metadata = {"study": study.name, "stage": "student", "run": run, "seed": seed, "key": job.key, "step": job.steps}
    parents = {path.name: sha256(path) for path in inputs}
    save_denoiser(
        folder / "student.safetensors", job.average.model, {**metadata, "git": git_state(), "parents": parents}
    )
    outputs = publish_training(job.folder, folder, "student.safetensors")
    write_card(
        folder,
        study,
        "student",
        run=run,
        seed=seed,
        started=started,
        inputs=inputs,
        outputs=outputs,
        measured=measured,
    )
    forget_state(job.folder)


def _training(study: Study, layout: Layout, run: str, seed: int, device: torch.device) -> Training:
    settings, data = study.resolved(run), read_dataset(study, layout)
    teacher = read_teacher(study, layout, device)
    # Weights, data order and noise depend on the seed alone, so that students of one seed differ in nothing else.
    student = student_from_teacher(teacher, dropout=settings.dropout, seed=derived_seed(seed, "student")).to(device)
    student.train().requires_grad_(True)
    average = Ema(student)
    preconditioning = read_preconditioning(study, layout, run, teacher.sigma_data, device)
    grid = time_grid(study, settings.nodes, device)
    distance = DISTANCES[settings.distance]
    objective: Objective = Endpoint(student, average.model, teacher, preconditioning, distance, grid, settings.target)
    if settings.objective == "trajectory":
        max_steps = settings.max_heun_steps or settings.nodes - 1
        objective = Trajectory(**vars(objective), max_steps=max_steps, dsm_weight=settings.dsm_weight)
    conditional = study.teacher.conditional

    def loss(step: int) -> Losses:
        draws = generator(seed, "distillation", step)
        images, labels = data.batch(settings.batch, draws, study.dataset.horizontal_flip)
        return objective(images.to(device), labels.to(device) if conditional else None, draws)

    return Training(
        label=f"student {run} seed {seed}",
        key=study.key("student", run, seed),
        model=student,
        average=average,
        optimizer=_OPTIMIZERS[settings.optimizer](student.parameters(), lr=settings.learning_rate),
        loss=loss,
        ema_rate=lambda step: settings.ema_rate,
        steps=settings.steps,
        batch=settings.batch,
        log_every=settings.log_every,
        seed=seed,
        folder=layout.training_state(run, seed),
        snapshot_every=settings.snapshot_every,
    )
