"""Readers of finished artifacts, which compare their keys first: dataset, teacher, coefficients, students."""

from typing import Any

import numpy as np
import torch

from consistency.base.arrays import read_arrays
from consistency.base.errors import UserError
from consistency.base.files import require_output
from consistency.config.job import Job
from consistency.config.student import Student
from consistency.config.study import Study
from consistency.data.prepared import ImageData, load_images
from consistency.nets.checkpoint import load_denoiser
from consistency.nets.denoiser import Denoiser
from consistency.nets.jumps import Fit, Jumps
from consistency.nets.own_preconditioning import own_preconditioning
from consistency.provenance.card import read_card
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.preconditioning import Preconditioning, build_preconditioning


def read_dataset(job: Job) -> ImageData:
    """Open the study's images."""
    read_card(job, "dataset")
    return load_images(job.paths.dataset)


def sigma_data(study: Study, data: ImageData) -> float:
    """Return the standard deviation of the data that the study uses."""
    value = study.noise.sigma_data
    return float(data.facts["sigma_data"]) if isinstance(value, str) else value


def read_teacher(job: Job, device: torch.device) -> Denoiser:
    """Read the study's teacher, frozen."""
    path = require_output(job.paths.teacher_weights, "teacher")
    return load_denoiser(path, job.key("teacher"))[0].to(device)


def require_classes(study: Study, data: ImageData, teacher: Denoiser) -> None:
    """Raise UserError if a conditional teacher has another number of classes than the data."""
    if study.teacher.conditional and teacher.label_dim != data.classes:
        raise UserError(
            f"the teacher is conditioned on {teacher.label_dim} classes, the dataset has {data.classes}: "
            "change dataset or teacher in the study (an unlabelled dataset needs an unconditional teacher)"
        )


def read_label_weights(job: Job, model: Denoiser) -> list[int]:
    """Read the relative frequency of each class in which the images of the study's networks are drawn
    (sampling.labels): the data's class counts, or 1 each; none if the model is unconditional.

    Raises UserError if the dataset is missing, or has another number of classes than the model.
    """
    if not model.label_dim or job.study.sampling.labels == "balanced":
        return [1] * model.label_dim
    data = read_dataset(job)
    require_classes(job.study, data, model)
    return data.class_counts


def read_student(job: Job, device: torch.device, rate: float | None = None, step: int | None = None) -> Denoiser:
    """Read a frozen student (EMA weights; rate: a further EMA rate; step: a snapshot, None for the end of training)."""
    path = require_output(job.weights(rate, step), f"student{job.options}")
    return load_denoiser(path, job.key("student"))[0].to(device)


def read_coefficients(job: Job) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of coefficients.npz."""
    return read_arrays(job.paths.fit, "coefficients", "times", "l", "s")


def read_ode(job: Job, device: torch.device) -> GeneralizedODE | None:
    """Read the ODE of the coefficients fitted from the teacher, for a student that uses them."""
    if not job.settings.needs_coefficients:
        return None
    read_card(job, "coefficients")
    arrays = read_coefficients(job)
    times, l, s = (torch.from_numpy(arrays[letter]) for letter in ("times", "l", "s"))
    return GeneralizedODE(times, l, s, device)


def preconditioning_of(settings: Student, model: Denoiser, ode: GeneralizedODE | None) -> Preconditioning:
    """Return the preconditioning of a student's network, with these coefficients or the network's own."""
    if settings.has_own_fit:
        return own_preconditioning(settings.preconditioning, model)
    return build_preconditioning(settings.preconditioning, model.sigma_data, ode)


def read_preconditioning(job: Job, model: Denoiser) -> Preconditioning:
    """Read the preconditioning of a student, given its network."""
    return preconditioning_of(job.settings, model, read_ode(job, next(model.parameters()).device))


def jumps_of(job: Job, data: ImageData) -> Jumps:
    """Return the settings of a student's jumps, with the teacher's coefficients if it uses them, and the data's class
    counts if it is conditional."""
    settings, fit = job.settings, None
    if settings.needs_coefficients:
        arrays = read_coefficients(job)
        fit = Fit(**{letter: arrays[letter].tolist() for letter in ("times", "l", "s")})
    return Jumps(
        preconditioning=settings.preconditioning,
        only_to_eps=settings.only_to_eps,
        noise=job.study.noise,
        fit=fit,
        class_counts=data.class_counts if job.study.teacher.conditional else [],
    )
